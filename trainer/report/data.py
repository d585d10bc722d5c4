"""What a report tells, handed in by whoever trained and evaluated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One hit of a search: an encoded image, its class, its cosine to the query, and whether the class is the query's."""

    image: bytes
    label: str
    cosine: float
    right: bool


@dataclass(frozen=True, slots=True)
class Sheet:
    """A query and its nearest neighbours, nearest first."""

    image: bytes
    label: str
    neighbours: Sequence[Neighbour]


@dataclass(frozen=True, slots=True)
class ReportData:
    """The facts of a report; what is unknown is left empty and its part of the page is left out.

    `before` and `after` map metric names (`recall_at_1`, `map_at_r`) to values of the untrained and the trained encoder
    on the evaluation set of `num_classes` classes and `num_images` images. `load_uri` is what MLflow loads.
    """

    name: str
    after: Mapping[str, float]
    before: Mapping[str, float] = field(default_factory=dict)
    num_classes: int = 0
    num_images: int = 0
    classes_unseen: bool = True  # no class of the evaluation set was trained on
    steps: int = 0
    wall_s: float = 0.0
    num_workers: int = 1
    sheets: Sequence[Sheet] = ()
    sheets_note: str = ""  # such as "A class has four images, so three of five can be right."
    config_yaml: str = ""
    load_uri: str = ""
    tracking_uri: str = ""
    ui_command: str = ""


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
