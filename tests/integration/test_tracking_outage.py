"""MLflow's server dies before, during and across a restart of the training: everything arrives, in one run, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.runfolder import read_lines
from cluster.spool import Position
from cluster.store import open_client
from tests.conftest import CONFIG
from tests.mlflow_server import free_port, history, kill, serve, wait_for

ROOT = Path(__file__).parents[2]
STEPS = 600
LONGEST_STALL_S = 0.05
SETTINGS = [f"train.steps={STEPS}", "train.checkpoint_every=100", "train.evaluate_every=300", "data.batch=16", "data.threads=1"]


def nearfar(*arguments: str) -> subprocess.Popen[str]:
    """The command line in a session of its own, with one thread inside of operations."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe, start_new_session=True)


def train(config: Path, *more: str) -> subprocess.Popen[str]:
    return nearfar("train", str(config), "--local", *more, *(part for setting in SETTINGS for part in ("--set", setting)))


def rows(run: Path) -> list[dict[str, float]]:
    return list(read_lines(run / "metrics.jsonl"))


def wait_for_rows(driver: subprocess.Popen[str], run: Path, count: int) -> None:
    wait_for(lambda: len(rows(run)) >= count or driver.poll() is not None, 300)
    assert driver.poll() is None, driver.communicate()[1]


@contextmanager
def paused(driver: subprocess.Popen[str]) -> Iterator[None]:
    """While this lasts no step is taken, so that a quick machine does not end the run meanwhile."""
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
    ranks = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    try:
        yield
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)


def assert_all_there(uri: str, run: Path) -> None:
    """One run with the right status, and every number of metrics.jsonl in it once."""
    client = open_client(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("nearfar").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.tags["nearfar.attempts"] == "2"
    assert len(found.inputs.dataset_inputs) == 2
    written = rows(run)
    assert [row["step"] for row in written] == list(range(STEPS + 1))
    keys = {key for row in written for key in row} - {"step", "time"}
    assert {"train/loss", "val/recall_at_1", "system/process_memory_megabytes"} <= keys
    for key in keys:
        assert history(uri, found.info.run_id, key) == [(row["step"], row[key]) for row in written if key in row], key
    assert {"config.yaml", "metrics.jsonl", "report", "result.json"} <= {
        file.path for file in client.list_artifacts(found.info.run_id)
    }


def sync(run: Path, code: int) -> dict[str, Any]:
    command = nearfar("track", "sync", str(run), "--json")
    out, err = command.communicate(timeout=120)
    assert command.returncode == code, err
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.acceptance
@pytest.mark.parametrize("back", ["before the end", "after the end"])
def test_every_metric_arrives_once_in_one_run_whatever_happens_to_server_and_trainer(
    digits: Path, tmp_path: Path, back: str
) -> None:
    port, config, run = free_port(), tmp_path / "run.yaml", tmp_path / "runs" / "small"
    uri = f"http://127.0.0.1:{port}"
    text = CONFIG.format(name="small", shards=digits, storage=tmp_path / "runs").replace("precision: fp64", "precision: fp32")
    config.write_text(f"{text}tracking: {{uri: '{uri}'}}\n")
    server = serve(port, tmp_path)
    kill(server)
    driver = train(config)
    try:
        wait_for_rows(driver, run, 60)
        with paused(driver):
            server = serve(port, tmp_path)
        wait_for_rows(driver, run, 150)
        wait_for(lambda: Position.read(run / "tracking.json").offset > 0, 120)
        kill(server)
        wait_for_rows(driver, run, 250)
        os.killpg(driver.pid, signal.SIGKILL)  # the ranks too
        driver.communicate()
        driver = train(config, "--resume")
        wait_for_rows(driver, run, 400)
        if back == "before the end":
            with paused(driver):
                server = serve(port, tmp_path)
        _, err = driver.communicate(timeout=600)
        assert driver.returncode == 0, err
        if back == "after the end":
            assert f"`nearfar track sync {run}`" in err
            assert sync(run, code=1)["waiting"] > 0
            server = serve(port, tmp_path)
            sync(run, code=0)
        assert_all_there(uri, run)
        assert sync(run, code=0)["sent"] == 0
        assert_all_there(uri, run)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.communicate()
        if server.poll() is None:
            kill(server)
    stalls = [row["train/log_s"] for row in rows(run) if "train/log_s" in row]
    print(f"\nthe longest of {len(stalls)} logs took {1000 * max(stalls):.2f} ms")
    assert max(stalls) < LONGEST_STALL_S
