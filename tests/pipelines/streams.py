"""What the tests of the loader share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from configs.schema import Augment, Data
from pipelines.batch import Batch
from pipelines.manifest import Manifest
from pipelines.stream import Loader

AUGMENT = Augment(crop=(0.5, 1.0), flip=0.5, color=0.3)


def settings(**values: Any) -> Data:
    defaults = {
        "train": "x",
        "image_size": 16,
        "batch": 8,
        "lanes": 4,
        "window": 16,
        "augment": AUGMENT,
        "max_bad_fraction": 1.0,
    }
    return Data.model_validate({**defaults, **values})


def take(manifest: Manifest, data: Data, count: int, **options: Any) -> list[Batch]:
    with Loader(manifest, data, **{"seed": 5, **options}) as loader:
        return [next(loader) for _ in range(count)]


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert (left is None and right is None) or torch.equal(left, right), field.name


def joined(parts: Iterable[Batch]) -> Batch:
    """Ranks' batches as one; records are counted on."""
    parts = list(parts)
    values: dict[str, Any] = {}
    for field in fields(Batch):
        tensors = [getattr(part, field.name) for part in parts]
        values[field.name] = None if tensors[0] is None else torch.cat(tensors)
    starts = np.cumsum([0, *[part.num_records for part in parts]])
    values["record"] = torch.cat([part.record + int(start) for part, start in zip(parts, starts, strict=False)])
    return Batch(**values)


def samples(batches: Iterable[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.sample.tolist()]
