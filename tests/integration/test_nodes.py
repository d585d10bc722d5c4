"""Two Ray nodes on this machine, each a raylet with an address of its own: one is lost, one is told to go."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.runfolder import read_lines
from tests.conftest import CONFIG
from tests.integration.test_train import ROOT, assert_same_curve, train
from tests.runs import standstill_s

pytestmark = pytest.mark.acceptance
HEAD, OTHER = "127.0.0.2", "127.0.0.3"
STEPS = 3000
SETTINGS = ("--set", "tracking.enabled=false", "--set", f"train.steps={STEPS}", "--set", "train.evaluate_every=1000")


@dataclass(frozen=True, slots=True)
class Nodes:
    """The processes of two nodes, the address of the cluster, and the environment of its clients."""

    address: str
    environment: dict[str, str]
    head: subprocess.Popen[bytes]
    other: subprocess.Popen[bytes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HEAD, 0))
        return int(probe.getsockname()[1])


def node(environment: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--block", "--num-cpus=1", "--disable-usage-stats", *arguments]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(what: str, found: Any, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Stopped by the processes that were started here, and nothing else."""
    folder = tempfile.mkdtemp(prefix="nf", dir="/tmp")  # a socket's path must be short
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment = {
        **os.environ,
        **secret,
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": folder,
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
    }
    address = f"{HEAD}:{free_port()}"
    head = node(
        environment, "--head", f"--node-ip-address={HEAD}", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"
    )
    other = None
    try:
        time.sleep(6)
        other = node(environment, f"--address={address}", f"--node-ip-address={OTHER}")
        time.sleep(6)
        yield Nodes(address, environment, head, other)
    finally:
        for process in (other, head):
            if process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


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
    with two_nodes() as nodes:
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
