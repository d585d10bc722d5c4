"""Sweeps on this machine's Ray: they end, they survive their driver, and the best one's config is worth its number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.runfolder import read_lines
from cluster.store import open_client
from tests.runs import PATIENCE_S, QUICK, ROOT, curve, wait_for
from tests.runs import train as train_alone

pytestmark = pytest.mark.acceptance

CONFIG = """
name: small
seed: 3
data: {{train: "{shards}/train", eval: "{shards}/eval", image_size: 16, batch: 32, per_class: 2, augment: {{crop: [0.7, 1]}}}}
encoder: {{name: convnet, dim: 16, patch: 2, widths: [8, 16], blocks: 1, grid: 2}}
optim: {{lr: 1.0e-3, warmup_steps: 5}}
train: {{steps: 90, reproducible: true, micro_batch: 16, log_every: 1, checkpoint_every: 10, evaluate_every: 10}}
cluster: {{workers: 1, storage: "{storage}", max_failures: 1}}
finish: {{report: false, onnx: false}}
"""
SPACE = """
optim.lr: {loguniform: [1e-5, 1e-2]}
loss.temperature: {uniform: [0.03, 0.5]}
"""


@pytest.fixture
def config(digits: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(shards=digits, storage=tmp_path / "runs"))
    (tmp_path / "space.yaml").write_text(SPACE)
    return path


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli", "sweep", str(config), "--space", str(config.with_name("space.yaml"))]
    quick = [part for setting in QUICK for part in ("--set", setting)]
    return subprocess.Popen(
        [*command, *quick, "--json", *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(driver: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return {**found, "stderr": err}


def statuses(folder: Path) -> dict[str, str]:
    return {f.parent.name: json.loads(f.read_text())["status"] for f in folder.glob("*/result.json")}


def last_steps(folder: Path) -> list[int]:
    return [max((row["step"] for row in read_lines(file)), default=0) for file in sorted(folder.glob("*-*/metrics.jsonl"))]


def test_six_trials_survive_their_driver_and_the_best_config_gives_the_same_number(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs/small-sweep"
    arguments = ("--trials", "6", "--parallel", "2", "--no-asha")
    driver = start(config, *arguments)
    wait_for(lambda: "FINISHED" in statuses(folder).values() and any(10 < s < 80 for s in last_steps(folder)), driver)
    driver.kill()  # alone: Ray and the trials must end by themselves
    driver.wait()
    done = {name: (folder / name / "result.json").stat().st_mtime_ns for name, s in statuses(folder).items() if s == "FINISHED"}
    begun = {path.parent.name for path in folder.glob("*/attempts.jsonl")} - set(done)

    found = finish(start(config, *arguments))

    assert [one["status"] for one in found["trials"]] == ["FINISHED"] * 6
    values = [one["value"] for one in found["trials"]]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]  # 1e-5 learns less than 1e-2
    for name, written in done.items():
        assert (folder / name / "result.json").stat().st_mtime_ns == written, "not run again"
    resumed = [name for name in begun if [r["from_step"] for r in read_lines(folder / name / "attempts.jsonl")][-1] > 0]
    assert resumed, "one at least goes on from its own checkpoint"
    for one in found["trials"]:
        assert [row["step"] for row in curve(one["run"])] == list(range(91)), "each step once, after a kill, too"

    best = found["best"]
    alone = train_alone(Path(best["config"]), "again")
    assert alone["metrics"]["recall_at_1"] == best["value"]
    assert curve(alone["run"]) == curve(best["run"])
    assert alone["weights"] == json.loads((Path(best["run"]) / "result.json").read_text())["weights"]

    client = open_client(f"sqlite:///{tmp_path}/runs/mlflow.db")
    parent = client.get_run(found["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    inside = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_name for run in inside} == {one["trial"] for one in found["trials"]}
    assert {run.info.status for run in inside} == {"FINISHED"}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"best.yaml", "sweep.json"}

    again = finish(start(config, *arguments))
    assert "nothing to do" in again["stderr"]
    assert again["trials"] == found["trials"]


def test_bad_trials_are_stopped_early(config: Path, tmp_path: Path) -> None:
    # One after the other, the best rate first: those after it are worse at the first rung.
    (tmp_path / "space.yaml").write_text("optim.lr: {grid: [3.0e-3, 1.0e-6, 2.0e-6]}\n")
    text = config.read_text().replace("steps: 90", "steps: 300").replace("evaluate_every: 10", "evaluate_every: 20")
    config.write_text(text)
    found = finish(start(config, "--parallel", "1", "--grace-steps", "40", "--metric", "map_at_r"))
    by_rate = {one["settings"]["optim.lr"]: one for one in found["trials"]}
    assert by_rate[3.0e-3]["status"] == "FINISHED"
    assert found["best"]["trial"] == by_rate[3.0e-3]["trial"]
    client = open_client(f"sqlite:///{tmp_path}/runs/mlflow.db")
    for rate in (1.0e-6, 2.0e-6):
        one = by_rate[rate]
        assert one["status"] == "STOPPED", found["stderr"]
        assert "stopped early at step 40" in one["reason"]
        assert 40 <= one["steps"] < 300
        run = client.get_run(json.loads((Path(one["run"]) / "tracking.json").read_text())["run_id"])
        assert run.info.status == "KILLED"
        assert run.data.tags["nearfar.sweep.ended"] == one["reason"]
        last = max(row["step"] for row in read_lines(Path(one["run"]) / "metrics.jsonl"))
        assert (Path(one["run"]) / "checkpoints" / f"step-{last:08d}").is_dir(), "it has saved where it stopped"
    # An early stop changes nothing: what a stopped trial has computed is what its config computes when nobody stops it.
    one = by_rate[2.0e-6]
    alone = train_alone(Path(one["run"]) / "config.yaml", "alone", f"cluster.storage={tmp_path}/runs")
    rows = curve(one["run"])
    assert rows == curve(alone["run"])[: len(rows)]


def test_a_trial_that_fails_does_not_end_the_sweep(config: Path, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "train", tmp_path / "damaged")
    for shard in (tmp_path / "damaged").glob("*.tar"):
        data = bytearray(shard.read_bytes())
        for place in range(len(data) // 3 + 40, len(data), 512):  # in every block of the tar
            data[place] ^= 0xFF
        shard.write_bytes(data)
    (tmp_path / "space.yaml").write_text(f"data.train: [{digits}/train, {tmp_path}/damaged]\n")
    config.write_text(config.read_text().replace("steps: 90", "steps: 40"))
    found = finish(start(config, "--trials", "2", "--no-asha"))
    good, bad = found["trials"]
    assert (good["status"], good["settings"]["data.train"]) == ("FINISHED", f"{digits}/train")
    assert (bad["status"], bad["settings"]["data.train"]) == ("FAILED", f"{tmp_path}/damaged")
    assert "data.max_bad" in bad["reason"]
    assert found["best"]["trial"] == good["trial"]


def test_ctrl_c_saves_all_trials_and_the_same_command_goes_on(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs/small-sweep"
    config.write_text(config.read_text().replace("steps: 90", "steps: 200"))
    arguments = ("--trials", "2", "--parallel", "2", "--no-asha", "--set", "train.checkpoint_every=1000")
    driver = start(config, *arguments)
    wait_for(lambda: len(last_steps(folder)) == 2 and min(last_steps(folder)) > 5, driver)
    os.kill(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=PATIENCE_S)
    assert (driver.returncode, out) == (130, "")
    assert "the same command goes on" in err
    assert set(statuses(folder).values()) == {"KILLED"}
    saved = last_steps(folder)
    found = finish(start(config, *arguments))
    assert [one["status"] for one in found["trials"]] == ["FINISHED"] * 2
    for name, step in zip(("small-sweep-001", "small-sweep-002"), saved, strict=True):
        assert [row["from_step"] for row in read_lines(folder / name / "attempts.jsonl")] == [0, step]


def test_a_trial_larger_than_this_machine_is_refused(config: Path) -> None:
    before = time.monotonic()
    driver = start(
        config, "--set", "cluster.workers=16", "--set", "cluster.gpus_per_worker=1", "--set", "train.reproducible=false"
    )
    out, err = driver.communicate(timeout=PATIENCE_S)
    assert (driver.returncode, out) == (2, "")
    assert "GPU" in err
    assert time.monotonic() - before < 30
