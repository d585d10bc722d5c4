"""How busy this machine and this process are, under the names that MLflow's page of system metrics knows.

Read from /proc, so elsewhere than on Linux most of it is left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

EVERY_S = 1.0  # /proc/stat takes up to a millisecond on a machine with many cores, and shares of less say little
MIB = 2**20
PROC = Path("/proc")
TICKS_IDLE = (3, 4)  # in /proc/stat: idle, and idle while a disk is waited for


@dataclass(frozen=True, slots=True)
class Clocks:
    """What runs on: seconds of the wall and of this process, and ticks of all cores, busy ones and all of them."""

    wall: float
    process: float
    busy: int
    ticks: int

    @staticmethod
    def now(stat: _File) -> Clocks:
        counts = _ticks(stat.read())
        idle = sum(counts[i] for i in TICKS_IDLE) if counts else 0
        return Clocks(time.perf_counter(), time.process_time(), sum(counts) - idle, sum(counts))


class System:
    """Readings of this rank's machine and process; between two readings, `EVERY_S` apart, the last one is repeated."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stat, self._statm, self._meminfo = (_File(PROC / name) for name in ("stat", "self/statm", "meminfo"))
        self._clocks = Clocks.now(self._stat)
        self._numbers: dict[str, float] = {}
        self._due = 0.0
        self._utilization: Callable[[torch.device], int] | None = torch.cuda.utilization

    def read(self) -> dict[str, float]:
        """Percentages are since the reading before, of one core for the process and of all cores for the machine."""
        if time.perf_counter() >= self._due:
            numbers = self._shares() | _memory(self._statm.read(), self._meminfo.read())
            if self._device.type == "cuda":
                numbers |= self._gpu()
            self._numbers = {f"system/{name}": value for name, value in numbers.items()}
            self._due = time.perf_counter() + EVERY_S
        return self._numbers

    def _shares(self) -> dict[str, float]:
        before, now = self._clocks, Clocks.now(self._stat)
        self._clocks = now
        numbers = {"process_cpu_percentage": 100 * (now.process - before.process) / max(now.wall - before.wall, 1e-9)}
        if now.ticks > before.ticks:
            numbers["cpu_utilization_percentage"] = 100 * (now.busy - before.busy) / (now.ticks - before.ticks)
        return numbers

    def _gpu(self) -> dict[str, float]:
        numbers = {
            "gpu_memory_allocated_megabytes": torch.cuda.memory_allocated(self._device) / MIB,
            "gpu_memory_reserved_megabytes": torch.cuda.memory_reserved(self._device) / MIB,
        }
        if self._utilization is not None:
            try:
                numbers["gpu_utilization_percentage"] = float(self._utilization(self._device))
            except Exception:  # needs nvidia-ml-py, whose errors are its own: asked once
                self._utilization = None
        return numbers


class _File:
    """A file of /proc, kept open: a reading is one call, in which a busy thread of this process can take its turn once."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: FileIO | None = path.open("rb", buffering=0)
        except OSError:
            self._file = None

    def read(self) -> str:
        """What it says now, empty where it says nothing."""
        if self._file is None:
            return ""
        try:
            return os.pread(self._file.fileno(), 1 << 16, 0).decode()
        except OSError:
            return ""


def _ticks(stat: str) -> list[int]:
    """Clock ticks of all cores since the machine's start, by what they were spent on; empty where it cannot be known."""
    try:
        return [int(count) for count in stat.splitlines()[0].split()[1:9]]
    except (ValueError, LookupError):
        return []


def _memory(statm: str, meminfo: str) -> dict[str, float]:
    try:
        pages = int(statm.split()[1])
        kib = {words[0].rstrip(":"): int(words[1]) for words in map(str.split, meminfo.splitlines())}
        used = kib["MemTotal"] - kib["MemAvailable"]
    except (ValueError, LookupError):
        return {}
    return {
        "process_memory_megabytes": pages * os.sysconf("SC_PAGE_SIZE") / MIB,
        "system_memory_usage_megabytes": used / 1024,
        "system_memory_usage_percentage": 100 * used / kib["MemTotal"],
    }
