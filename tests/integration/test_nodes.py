"""Two Ray nodes on this machine, each a raylet with an address of its own: one is lost, one is told to go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.runfolder import read_lines
from tests import runs
from tests.conftest import CONFIG
from tests.integration.test_train import ROOT, assert_same_curve, train
from tests.ray_nodes import can_make_namespaces, hosts, ray_nodes, wait_for
from tests.runs import standstill_s

pytestmark = pytest.mark.acceptance
STEPS = 3000
SETTINGS = ("--set", "tracking.enabled=false", "--set", f"train.steps={STEPS}", "--set", "train.evaluate_every=1000")


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nodes")
    config = folder / "run.yaml"
    text = CONFIG.format(name="small", shards=digits, storage=folder / "runs")
    config.write_text(text.replace("workers: 2", "workers: [1, 2], timeout_s: 30"))
    return config, train(config, "undisturbed", "--local", "--set", "cluster.workers=1", *SETTINGS)


@pytest.mark.parametrize("how", ["killed", "told to go"])
def test_a_run_goes_on_when_a_node_goes(undisturbed: tuple[Path, dict[str, Any]], how: str) -> None:
    config, expected = undisturbed
    name = how.replace(" ", "-")
    run = config.parent / "runs" / name
    with hosts("addresses") as two, ray_nodes(hosts=two) as nodes:
        command = [sys.executable, "-m", "cluster.cli", "train", str(config), "--json", "--address", nodes.address]
        command += ["--set", f"name={name}", *SETTINGS]
        driver = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=nodes.environment
        )
        wait_for("training", lambda: len(list(read_lines(run / "metrics.jsonl"))) > 60 or driver.poll() is not None)
        assert driver.poll() is None, driver.communicate()[1]
        before = last_step(run)
        if how == "killed":
            os.killpg(nodes.other.pid, signal.SIGKILL)
        else:
            nodes.other.send_signal(signal.SIGTERM)
        out, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, err
    rows = list(read_lines(run / "attempts.jsonl"))
    print(f"\nnode {how} at step {before}: no new step for {standstill_s(run):.0f} s, {rows[1]}")
    assert rows[0]["world"] == 2
    assert_same_curve(json.loads(out), expected)


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_lines(run / "metrics.jsonl")), default=-1)


@pytest.mark.parametrize("where", ["addresses", "namespaces"])
def test_two_nodes_compute_what_one_process_does(digits: Path, tmp_path: Path, where: str) -> None:
    if where == "namespaces" and not can_make_namespaces():
        pytest.skip("needs root, `ip` and network namespaces")
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(name="small", shards=digits, storage=tmp_path / "runs"))
    exact = ("train.precision=fp32", "train.reproducible=true", "train.micro_batch=16")
    alone = runs.train(config, "alone", *exact, "cluster.workers=1")
    quick = [part for setting in (*runs.QUICK, *exact) for part in ("--set", setting)]
    with hosts(where) as found, ray_nodes(hosts=found) as nodes:

        def on_head(*settings: str) -> subprocess.CompletedProcess[str]:
            pairs = [part for setting in settings for part in ("--set", setting)]
            command = [sys.executable, "-m", "cluster.cli", "train", str(config), "--json", "--address", nodes.address]
            return subprocess.run(
                [*found[0].prefix, *command, *quick, *pairs],
                cwd=ROOT,
                env=nodes.environment,
                text=True,
                capture_output=True,
                check=False,
            )

        refused = on_head("name=private")
        assert refused.returncode == 1
        assert "is a file of one machine, and this cluster has 2 nodes" in refused.stderr
        done = on_head("name=two", "tracking.enabled=false")
    assert done.returncode == 0, done.stderr
    runs.assert_equal(json.loads(done.stdout), alone)
