"""What the names of the parts of a step cost, unwatched and while profiling. Nothing is asserted of the times."""

from __future__ import annotations

import time

import pytest
import torch

from cluster.profiling import _Clock
from tests.benchmarks.measure import table
from trainer import ranges

pytestmark = pytest.mark.benchmark

TIMES, PARTS_A_STEP = 20000, 16  # how many parts a step of two ranks goes through


def microseconds() -> float:
    """Of one part without anything in it; the least of several rounds."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(TIMES):
            with ranges.part(ranges.LOSS):
                pass
        best = min(best, time.perf_counter() - began)
    return 1e6 * best / TIMES


def test_what_a_part_costs() -> None:
    off = microseconds()
    with ranges.watched(_Clock(torch.device("cpu")).part):
        on = microseconds()
    rows = [[name, f"{us:.2f} us", f"{PARTS_A_STEP * us / 1000:.4f} ms"] for name, us in (("unwatched", off), ("profiled", on))]
    table("parts of a step", ["", "a part", f"a step of {PARTS_A_STEP}"], rows)
