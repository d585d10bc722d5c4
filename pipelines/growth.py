"""Data that grows while a run goes on: which shards a source's order runs over, from which position on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.errors import Unrecoverable
from configs.schema import Data
from pipelines.hashing import Int64s
from pipelines.manifest import Manifest
from pipelines.mixture import Mixture, parts_of
from pipelines.quotas import Quotas
from pipelines.units import Units


@dataclass(frozen=True, slots=True)
class Stage:
    """From position `first` of the source's own order, where epoch `first_epoch` begins: its first `num_shards` shards."""

    first: int
    first_epoch: int
    num_shards: int


@dataclass(frozen=True, slots=True)
class History:
    """What a run knows of one source: enough to give the same stream again after the source has grown."""

    digest: str  # of the shards of the last stage
    num_classes: int
    stages: tuple[Stage, ...]

    @property
    def num_shards(self) -> int:
        return self.stages[-1].num_shards

    def as_dict(self) -> dict[str, Any]:
        stages = [[stage.first, stage.first_epoch, stage.num_shards] for stage in self.stages]
        return {"digest": self.digest, "num_classes": self.num_classes, "stages": stages}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> History:
        return cls(saved["digest"], saved["num_classes"], tuple(Stage(*stage) for stage in saved["stages"]))


def begin(manifest: Manifest) -> tuple[History, ...]:
    """One stage for each source: all that it holds."""
    return tuple(History(part.digest, part.num_classes, (Stage(0, 0, len(part.sizes)),)) for part in parts_of(manifest))


def follow(before: Sequence[History], manifest: Manifest, data: Data, position: int, *, accept: bool) -> tuple[History, ...]:
    """What `before` has become: a source with more shards goes on over all of them at its next epoch's border.

    position: of the whole stream, up to which it was consumed. Raises ValueError when a source holds other data than
    before, or more and `accept` is false.
    """
    parts = parts_of(manifest)
    if len(parts) != len(before):
        raise ValueError(f"data.train: {len(before)} sources before, {len(parts)} now; give the same ones in the same order")
    places = Quotas(weights_of(manifest)).before(position).tolist()
    return tuple(
        _follow(history, part, data, place, accept=accept) for history, part, place in zip(before, parts, places, strict=True)
    )


def verify(histories: Sequence[History], manifest: Manifest) -> None:
    """Raise Unrecoverable when this process does not see the data that the run was started with."""
    for history, part in zip(histories, parts_of(manifest), strict=True):
        seen = part.digest_of_first(history.num_shards)
        if seen != history.digest:
            raise Unrecoverable(
                f"{part.location!r} has other shards here than where the run was started (digest {seen[:12]}, not "
                f"{history.digest[:12]}); give every node the same data, and do not change it while a run starts"
            )


def weights_of(manifest: Manifest) -> list[float]:
    """Of every source; only their ratios matter."""
    return manifest.weights if isinstance(manifest, Mixture) else [1.0]


def unit_sizes(part: Manifest, data: Data) -> Int64s:
    """Positions of the order in each shard of a source: records, or units of K rows.  [M]"""
    return part.sizes if data.per_class is None else cut(part, data, seed=0).sizes


def cut(part: Manifest, data: Data, *, seed: int) -> Units:
    """A source's units of `data.per_class` rows."""
    assert data.per_class is not None
    return Units(part.runs, len(part.sizes), per_class=data.per_class, tail=data.tail, seed=seed)


def _follow(history: History, part: Manifest, data: Data, place: int, *, accept: bool) -> History:
    """place: up to which the source's own order was consumed."""
    kept = part.digest_of_first(history.num_shards)
    if kept != history.digest:
        raise ValueError(
            f"{part.location!r} holds other data than the run was started with (digest {kept[:12]}, not "
            f"{history.digest[:12]}); give back its first {history.num_shards} shards, or start a new run"
        )
    if len(part.sizes) == history.num_shards:
        return history
    if not accept:
        raise ValueError(
            f"{part.location!r} has grown from {history.num_shards} to {len(part.sizes)} shards (digest {part.digest[:12]}, "
            f"not {history.digest[:12]}); --resume --accept-new-data takes the new ones up at the next epoch's border"
        )
    last = history.stages[-1]
    size = int(unit_sizes(part, data)[: last.num_shards].sum())
    epochs = max(0, -(-(place - last.first) // size))  # of the last stage, until its next border
    stage = Stage(last.first + epochs * size, last.first_epoch + epochs, len(part.sizes))
    kept_stages = history.stages if epochs else history.stages[:-1]  # a stage that has not begun gives way
    return replace(history, digest=part.digest, num_classes=part.num_classes, stages=(*kept_stages, stage))
