"""What a report tells, handed in by whoever trained and evaluated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.report.insight import Insight

HARDNESS = {"hard": "hard_fraction", "semi-hard": "semi_hard_fraction", "easy": "easy_fraction"}


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the workers. `ended`: why the one before it did."""

    at: str  # date and time
    workers: int
    from_step: int
    ended: str = ""
    skipped: Sequence[str] = ()  # checkpoints that were passed over, and why


@dataclass(frozen=True, slots=True)
class Health:
    """How the data and the machines behaved."""

    bad: Sequence[Mapping[str, Any]] = ()  # rows of quarantine.jsonl
    unread: Sequence[Mapping[str, Any]] = ()  # such rows of the evaluation set
    starts: Sequence[Start] = ()
    ended: str = ""  # why an unfinished run did


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The evaluation set, and what was looked at of it."""

    num_classes: int = 0
    num_images: int = 0
    num_seen: int = 0  # embedded for the report
    kind: str = "labelled"
    classes_unseen: bool = False  # no class of it was trained on
    sampled: str = ""  # how the images were chosen, when not all were


@dataclass(frozen=True, slots=True)
class ReportData:
    """The facts of a report; what is unknown is left empty and its part of the page is left out.

    `before` and `after` map metric names (`recall_at_1`; `recall_at_1_low` and `_high` for its interval) to values of the
    untrained and the trained encoder on the evaluation set. `status`: of result.json, or empty while there is none.
    """

    name: str
    after: Mapping[str, float] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    headline: str = "recall_at_1"
    best: tuple[int, float] | None = None  # (step, headline) of the best evaluation
    status: str = "FINISHED"
    steps: int = 0
    of_steps: int = 0  # of the whole run; 0: not known
    stopped_early: bool = False
    wall_s: float = 0.0
    num_workers: int = 1
    evaluation: Evaluation | None = None
    insight: Insight | None = None
    notes: Sequence[str] = ()  # what could not be shown, and why
    health: Health = Health()
    leakage: Mapping[str, Any] | None = None
    config_yaml: str = ""
    load: str = ""  # lines of Python
    ui_command: str = ""

    @property
    def finished(self) -> bool:
        return self.status == "FINISHED"


def read_series(path: Path) -> dict[str, list[tuple[int, float]]]:
    """`metrics.jsonl` as {metric: [(step, value), ...]} by rising step; a step written twice counts once, the first time."""
    series: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        for key, value in record.items():
            if key not in ("step", "time") and type(value) in (int, float) and math.isfinite(value):
                series.setdefault(key, {}).setdefault(int(record["step"]), float(value))
    return {key: sorted(points.items()) for key, points in series.items()}


def mining_series(series: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """The shares of hard, semi-hard and easy triplets at the steps that have all; nothing when no loss tells them.

    Those of the first loss that does, if there are several.
    """
    first = next((name for name in series if name.endswith(f"/{HARDNESS['hard']}")), None)
    if first is None:
        return {}
    place = first.removesuffix(HARDNESS["hard"])
    found = {word: dict(series.get(place + name, ())) for word, name in HARDNESS.items()}
    steps = sorted(set.intersection(*(set(points) for points in found.values())))
    return {word: [(step, points[step]) for step in steps] for word, points in found.items()}
