"""What a profile says, in RUN/profile/: a trace of every rank and steps.json, the time of a step by its parts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VERSION = 1
FILE = "steps.json"
OTHER = "other"
WARM_UP = 5  # steps before: the first ones fill caches, pick kernels and wait for the loader to get ahead


@dataclass(frozen=True, slots=True)
class RankTimes:
    """Milliseconds a step of one rank; `parts` adds up to `step`."""

    rank: int
    node: str
    trace: str  # file beside steps.json
    step: float
    parts: dict[str, float]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """`steps` steps from `first` on. Time that a rank waits for slower ones is in the part where it waits."""

    first: int
    steps: int
    device: str
    ranks: list[RankTimes]

    @property
    def step(self) -> float:
        """Milliseconds, the mean of all ranks."""
        return sum(rank.step for rank in self.ranks) / len(self.ranks)

    def mean(self, part: str) -> float:
        return sum(rank.parts[part] for rank in self.ranks) / len(self.ranks)

    def slowest(self, part: str) -> RankTimes:
        """The rank that spends most time in a part."""
        return max(self.ranks, key=lambda rank: rank.parts[part])

    def as_dict(self) -> dict[str, Any]:
        rows = {
            part: {
                "ms": self.mean(part),
                "share": self.mean(part) / self.step,
                "slowest_ms": self.slowest(part).parts[part],
                "slowest_rank": self.slowest(part).rank,
            }
            for part in self.ranks[0].parts
        }
        own = [asdict(rank) for rank in self.ranks]
        about = {"first_step": self.first, "steps": self.steps, "device": self.device, "world": len(self.ranks)}
        return {"version": VERSION, **about, "step_ms": self.step, "parts": rows, "ranks": own}


def read(folder: Path) -> StepTimes:
    """RUN/profile. Raises ValueError for a version that is not known."""
    found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    if found["version"] != VERSION:
        raise ValueError(f"{folder / FILE} is of version {found['version']}; this nearfar reads {VERSION}")
    return StepTimes(found["first_step"], found["steps"], found["device"], [RankTimes(**rank) for rank in found["ranks"]])


def describe(times: StepTimes) -> str:
    """The table for a person."""
    world = len(times.ranks)
    head = (
        f"steps {times.first} to {times.first + times.steps - 1}, {times.device}, {world} workers: {times.step:.2f} ms a step"
    )
    lines = [head, f"{'':20}{'ms a step':>10}{'share':>8}   slowest rank"]
    for part in times.ranks[0].parts:
        slowest = times.slowest(part)
        where = f"{slowest.parts[part]:.2f} ms, rank {slowest.rank} on {slowest.node}" if world > 1 else ""
        mean = times.mean(part)
        lines.append(f"{part:20}{mean:10.2f}{100 * mean / times.step:7.1f} %   {where}".rstrip())
    return "\n".join(lines)
