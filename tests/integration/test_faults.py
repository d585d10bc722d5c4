"""What happens to a run whose workers stop, hang or are told to end: one clear line each, and the curve it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.runfolder import read_lines
from tests.integration.test_train import _workers, assert_same_curve, start, train

pytestmark = pytest.mark.acceptance  # `make test` has Ctrl-C, and a killed worker, in test_train.py
QUICK = ("--set", "tracking.enabled=false", "--set", "train.steps=200")


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The config, and the run of one process that nothing happens to."""
    from tests.conftest import CONFIG

    folder = tmp_path_factory.mktemp("faults")
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(name="small", shards=digits, storage=folder / "runs"))
    return config, train(config, "undisturbed", "--local", "--set", "cluster.workers=1", *QUICK)


def begun(config: Path, name: str, *settings: str, rows: int = 25) -> tuple[subprocess.Popen[str], Path]:
    """A run of two local processes that is past its checkpoint at step 20, and its folder."""
    run = config.parent / "runs" / name
    driver = start(config, name, "--local", "--json", *QUICK, *settings)
    deadline = time.monotonic() + 120
    while len(list(read_lines(run / "metrics.jsonl"))) < rows:
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return driver, run


def last_row(run: Path) -> dict[str, Any]:
    return list(read_lines(run / "attempts.jsonl"))[-1]


@pytest.mark.parametrize("to", ["a worker", "the driver", "all"])
def test_sigterm_saves_stops_and_goes_on_as_if_nothing_had_happened(undisturbed: tuple[Path, dict[str, Any]], to: str) -> None:
    config, expected = undisturbed
    driver, run = begun(config, f"terminated-{to.split()[-1]}", rows=12)
    workers = _workers(driver.pid)
    told = {"the driver": [driver.pid], "a worker": workers[1:], "all": [driver.pid, *workers]}[to]
    for pid in told:
        os.kill(pid, signal.SIGTERM)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 143, err
    assert "Traceback" not in err
    assert json.loads((run / "result.json").read_text())["status"] == "KILLED"
    step = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert 11 <= step < 200
    assert f"the state of step {step} is saved; `nearfar train CONFIG --resume` goes on from there" in err
    assert_same_curve(train(config, run.name, "--local", "--resume", *QUICK), expected)
    assert last_row(run)["from_step"] == step
    assert last_row(run)["last_ended"] == "stopped by SIGTERM" + (" to a worker" if to == "a worker" else "")


def test_a_worker_that_stands_still_is_given_up_and_the_run_goes_on(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    config, expected = undisturbed
    driver, run = begun(config, "frozen", "--set", "cluster.timeout_s=8")
    os.kill(_workers(driver.pid)[1], signal.SIGSTOP)
    out, err = driver.communicate(timeout=150)
    assert driver.returncode == 0, err
    assert_same_curve(json.loads(out), expected)
    assert last_row(run)["from_step"] in range(20, 201, 20)
    assert last_row(run)["last_ended"].startswith("rank 0")  # the one that waited in vain
    assert err.count("the workers failed and start again from the last checkpoint: rank 0") == 1


def test_a_second_ctrl_c_stops_at_once(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    config, _ = undisturbed
    driver, run = begun(config, "twice", "--set", "cluster.timeout_s=100", rows=25)
    workers = _workers(driver.pid)
    os.kill(workers[0], signal.SIGSTOP)  # so that the first is never answered
    driver.send_signal(signal.SIGINT)
    time.sleep(1)
    assert driver.poll() is None
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert err.rstrip().endswith("interrupted; `nearfar train CONFIG --resume` goes on from the last checkpoint")
    assert "Traceback" not in err
    assert json.loads((run / "result.json").read_text())["status"] == "KILLED"
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
