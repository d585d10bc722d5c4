"""The shards of an evaluation: what is searched for, in what, and which parts of the keys keep images apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.context import RankContext
from configs.evaluation import FOLDS, TRIPLETS, Evaluate
from configs.schema import Data
from pipelines.batch import Batch
from pipelines.manifest import Manifest
from pipelines.samples import TARGET
from pipelines.stream import evaluation_batches
from trainer.encoding import Encoder
from trainer.evaluate import Embedded, embed_all
from trainer.measurement import Across, Evaluation, measure, protocol_of


@dataclass(frozen=True, slots=True)
class Loading:
    """How a rank reads images: at most `batch` at once, always as many if `fixed`; `beat` is called for every batch."""

    data: Data
    context: RankContext
    batch: int
    fixed: bool = False
    beat: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Images to search for, and a gallery unless they are searched among themselves; `parts`: what `across` catches."""

    queries: Manifest
    gallery: Manifest | None = None
    across: Across | None = None
    parts: tuple[str, ...] = ()
    sides: str = "all"  # evaluate.queries

    @classmethod
    def open(cls, shards: str, how: Evaluate, *, cache: str | None = None) -> EvaluationSet:
        """Raises ValueError where one of the data sets is not there, or a key does not match `across`."""
        queries = Manifest.open(shards, cache=cache)
        gallery = None if how.gallery is None else Manifest.open(how.gallery, cache=cache)
        if how.across is None:
            return cls(queries, gallery, sides=how.queries)
        catches = [_catches(manifest, how.across) for manifest in (queries, gallery or queries)]
        parts = tuple(sorted({part for caught in catches for part in caught}))
        number = {part: index for index, part in enumerate(parts)}
        numbers = [torch.tensor([number[part] for part in caught]) for caught in catches]
        across = Across(
            _look_up(queries, numbers[0]),
            _look_up(gallery or queries, numbers[1]),
            only_class=how.across_hides == "same_class",
        )
        return cls(queries, gallery, across, parts, how.queries)

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError when one of `names` is not for such data, or no image has anything to find."""
        for family, members, kind in (("folds", FOLDS, "labelled_pair"), ("triplets", TRIPLETS, "triplet")):
            named = {family, *members} & set(names)
            if named and self.queries.kind != kind:
                what = kind.replace("_", " ")
                raise ValueError(f"{min(named)} is for {what}s, but {self.queries.location} holds {self.queries.kind} records")
        for manifest in (self.queries, self.gallery) if self.sides != "all" else ():
            if manifest is not None and manifest.kind == "labelled":
                raise ValueError(
                    f"queries: {self.sides} is for pairs and triplets, but {manifest.location} holds labelled images; take all"
                )
        if self.gallery is None and self.across is None and self.sides == "all":
            return
        among = None if self.gallery is None else _bare(self.gallery)
        if bool((protocol_of(_bare(self.queries), among, self.across, self.sides).relevant() > 0).any()):
            return
        other = "another part" if self.sides == "all" else f"what {self.sides} are searched in"
        where = other if self.gallery is None else self.gallery.location
        raise ValueError(f"no image of {self.queries.location} has one of its class in {where}, so nothing can be found")

    def measure(
        self, encoder: Encoder, prepare: Callable[[Batch], Tensor], names: Sequence[str], how: Loading, *, resamples: int = 0
    ) -> Evaluation:
        """Embed everything and measure `names`. Collective: every rank calls it."""
        found = _embedded(self.queries, encoder, prepare, how)
        among = None if self.gallery is None else _embedded(self.gallery, encoder, prepare, how)
        more = {"gallery": among, "across": self.across, "queries": self.sides}
        return measure(found, names, resamples=resamples, beat=how.beat, **more)  # type: ignore[arg-type]


def _embedded(manifest: Manifest, encoder: Encoder, prepare: Callable[[Batch], Tensor], how: Loading) -> Embedded:
    rank, world = how.context.rank, how.context.world
    batches = evaluation_batches(manifest, how.data, rank=rank, world=world, batch=how.batch, fixed=how.fixed)
    return embed_all(encoder, _beating(batches, how.beat), prepare)


def _beating(batches: Iterator[Batch], beat: Callable[[], None]) -> Iterator[Batch]:
    for batch in batches:
        beat()
        yield batch


def _catches(manifest: Manifest, across: str) -> list[str]:
    """What the expression's group catches in the key of every record, in order. Raises ValueError for a key without it."""
    expression, caught = re.compile(across), []
    for shard in range(len(manifest.sizes)):
        for key in manifest.keys(shard):
            match = expression.search(key)
            if match is None or match[1] is None:
                raise ValueError(f"evaluate.across: {across!r} does not match the key {key!r} in {manifest.location}")
            caught.append(match[1])
    return caught


def _bare(manifest: Manifest) -> Embedded:
    """What is known of all images before there is an encoder."""
    group, sample, uid = [], [], []
    for shard in range(len(manifest.sizes)):
        table = manifest.table(shard)
        image = table.view != TARGET
        row = np.repeat(np.arange(len(table.start) - 1), np.diff(table.start))[image]
        group.append(table.group[image])
        uid.append(table.uid[image])
        sample.append(np.stack([np.full_like(row, shard), row, table.view[image]], axis=1))
    samples = torch.from_numpy(np.concatenate(sample))
    groups, uids = (torch.from_numpy(np.concatenate(part)) for part in (group, uid))
    return Embedded(torch.empty(len(samples), 0), groups, samples, uid=uids)


def _look_up(manifest: Manifest, part: Tensor) -> Callable[[Tensor], Tensor]:
    starts = torch.from_numpy(manifest.starts)

    def look_up(sample: Tensor) -> Tensor:
        """samples [N, 3] (shard, row, view) -> numbers [N]"""
        rows = sample.cpu()
        return part[starts[rows[:, 0]] + rows[:, 1]].to(sample.device)

    return look_up
