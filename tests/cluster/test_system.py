"""What the machine is doing, compared with the system's own accounts of it."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
import torch

from cluster import system
from cluster.system import System


def test_the_process_is_as_large_and_as_busy_as_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "EVERY_S", 0.0)
    readings = System(torch.device("cpu"))
    wall, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    while time.process_time() < cpu.ru_utime + cpu.ru_stime + 0.3:
        sum(range(1000))
    found = readings.read()
    after = resource.getrusage(resource.RUSAGE_SELF)
    busy = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    expected = 100 * busy / (time.perf_counter() - wall)
    assert found["system/process_cpu_percentage"] == pytest.approx(expected, rel=0.1)
    assert 0 < found["system/process_memory_megabytes"] <= after.ru_maxrss / 1024 + 1
    assert 0 < found["system/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/system_memory_usage_percentage"] < 100


def test_between_two_readings_the_last_one_is_repeated() -> None:
    readings = System(torch.device("cpu"))
    first = readings.read()
    assert readings.read() is first


def test_where_the_system_tells_nothing_the_process_is_still_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "PROC", tmp_path)
    assert set(System(torch.device("cpu")).read()) == {"system/process_cpu_percentage"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: there is no memory of one to be told of")
def test_the_memory_of_the_gpu_is_told() -> None:
    kept = torch.zeros(64, 2**20, dtype=torch.uint8, device="cuda")
    found = System(kept.device).read()
    assert found["system/gpu_memory_reserved_megabytes"] >= found["system/gpu_memory_allocated_megabytes"] >= 64
