"""`nearfar train` as processes of their own: started, watched, killed; and the curves that they leave."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cluster.runfolder import read_lines

ROOT = Path(__file__).parents[1]
PACE = ("time", "train/images_per_s", "train/wait_share", "train/checkpoint_wait_s", "train/log_s")
MACHINE = ("loader/", "system/")
QUICK = (
    "finish.report=false",
    "finish.onnx=false",
    "data.check_duplicates=false",
)  # for runs of which only the training matters
PATIENCE_S = 600  # acceptance runs share their machine


def start(
    config: Path,
    name: str,
    *settings: str,
    local: bool = True,
    resume: bool = False,
    threads: int = 1,
    ctrl_c: signal.Handlers = signal.SIG_DFL,
) -> subprocess.Popen[str]:
    """In a process group of its own, with so many threads inside of operations. `ctrl_c`: what its starter did with SIGINT."""
    flags = [*(["--local"] if local else []), *(["--resume"] if resume else [])]
    pairs = [part for setting in (f"name={name}", *QUICK, *settings) for part in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "train", str(config), "--json", *flags, *pairs],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, ctrl_c),
    )


def finish(driver: subprocess.Popen[str]) -> dict[str, Any]:
    """The result that it prints, and all that it told."""
    out, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return {**found, "stderr": err}


def train(config: Path, name: str, *settings: str, **how: Any) -> dict[str, Any]:
    return finish(start(config, name, *settings, **how))


def curve(run: str | Path) -> list[dict[str, float]]:
    """All that was logged but for the pace, the loaders' counts and the machine's own."""
    rows = list(read_lines(Path(run) / "metrics.jsonl"))
    return [{k: v for k, v in row.items() if k not in PACE and not k.startswith(MACHINE)} for row in rows]


def standstill_s(run: Path) -> float:
    """The longest time without a new step."""
    times = [row["time"] for row in read_lines(run / "metrics.jsonl")]
    return max(after - before for before, after in itertools.pairwise(times))


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the last bit, every step exactly once."""
    assert curve(found["run"]) == curve(expected["run"])
    assert [row["step"] for row in curve(found["run"])] == list(range(found["steps"] + 1))
    assert found["weights"] is not None
    assert found["weights"] == expected["weights"]
    assert found["metrics"] == expected["metrics"]


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[str], *, every_s: float = 0.01) -> None:
    """Until it holds, which it must before the driver ends."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(every_s)


def ranks(driver: subprocess.Popen[str]) -> list[int]:
    """Process ids of the driver's local ranks; itself when it is the only one."""
    try:
        children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
        found = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except FileNotFoundError:
        return []
    return found or [driver.pid]


def ended(process: int) -> bool:
    """Whether there is no such process, or only what is left to be collected."""
    return _state(process) in ("", "Z", "X")


def stopped(process: int) -> bool:
    return _state(process) == "T"


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
