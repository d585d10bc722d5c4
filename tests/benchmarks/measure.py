"""Clocks and memory for benchmarks. A case is a function of tests/benchmarks/cases.py, named, with JSON options."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

THREADS = 2
FULL = os.environ.get("NEARFAR_BENCH") == "full"
ROOT = Path(__file__).parent.parent.parent
MIB = 2**20


def fastest(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each function: the least of `rounds`, taken in turns, so that a busy machine is busy for all."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def apart(case: str, repeat: int = 1, **options: Any) -> tuple[float, int]:
    """(seconds, bytes of peak extra memory) of a case in a process of its own.

    Extra: above what the process held when it was about to start, with its inputs made and its libraries warm.
    """
    command = [sys.executable, "-m", "tests.benchmarks.measure", case, json.dumps({"repeat": repeat, **options})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, extra = json.loads(done.stdout.splitlines()[-1])
    return seconds, extra


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns; the first to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    busy = os.getloadavg()[0]
    print(f"\n\n{title}" + (f"\n(the machine was busy: load {busy:.1f})" if busy > THREADS + 0.5 else ""))
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]))


def _resident(name: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def resident() -> int:
    """Bytes that this process holds."""
    return _resident("VmRSS")


def _settle() -> int:
    """Hand free memory back to the system and forget the peak so far; bytes held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    return _resident("VmRSS")


def _main(case: str, options: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(THREADS)
    make = getattr(importlib.import_module("tests.benchmarks.cases"), case)
    repeat = options.pop("repeat")
    make(**{**options, "size": 64})()  # warms libraries up
    function = make(**options)
    held = _settle()
    seconds = fastest({case: function}, repeat)[case]
    print(json.dumps([seconds, _resident("VmHWM") - held]))


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
