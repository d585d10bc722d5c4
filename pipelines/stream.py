"""The loaders: an endless stream to train on, and one pass in order to evaluate on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from types import TracebackType

import numpy as np

from configs.schema import Augment, Data
from pipelines.batch import Batch
from pipelines.decoded import Decoded
from pipelines.fill import Filler
from pipelines.growth import History, begin, unit_sizes, weights_of
from pipelines.manifest import Manifest
from pipelines.mixed_order import MixedOrder
from pipelines.mixture import parts_of
from pipelines.plan import Plan, mask_padding, plan_records, plan_units, two_views
from pipelines.quotas import Quotas
from pipelines.tally import OnBad, Tally


class Loader:
    """One rank's slices of the stream's batches, without end.

    Batch t of the stream is the positions [t * units, (t + 1) * units), whatever the world size; a position counts records,
    or units of K rows with `data.per_class`. `position` is where the next batch begins that `next` has not returned yet:
    with the `histories` of data that has grown it is all that a checkpoint needs. `wait_s`, `images` and `bad` count what
    happened so far.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: Data,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        histories: Sequence[History] | None = None,
        on_bad: OnBad | None = None,
        piece: int = 1,
    ) -> None:
        """`histories` of the sources; by default all that they hold, from the start.

        `piece`: records (images with `per_class`) that are never split between ranks.
        Raises ValueError when the data cannot make such batches.
        """
        histories = begin(manifest) if histories is None else histories
        units_per_epoch(manifest, data, histories)  # refuses what is impossible
        self.units_per_batch = data.batch // (data.per_class or 1)
        self._piece = max(1, piece // (data.per_class or 1))
        num_pieces = -(-self.units_per_batch // self._piece)
        if not 0 <= rank < world <= num_pieces:
            what = "units" if self._piece == 1 else f"pieces of {piece}"
            raise ValueError(f"rank {rank} of {world} workers cannot have a share of {num_pieces} {what} a batch")
        self.position = position
        self._manifest, self._seed, self._rank, self._world = manifest, seed, rank, world
        self._units, self._views = data.per_class is not None, data.views
        self._order = MixedOrder(manifest, data, seed=seed, histories=histories)
        self._tally = Tally(manifest, data, on_bad)
        starts = itertools.count(position, self.units_per_batch)
        decoded = Decoded(round(data.decoded_mb * 2**20), manifest.num_images)
        self._filler = Filler(manifest, data, data.augment, (self._planner(start) for start in starts), decoded)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """Raises RuntimeError when too many images are unreadable, and whatever a thread ran into."""
        filled = next(self._filler)
        self._tally.count(filled)
        self.position += self.units_per_batch
        return filled.batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def wait_s(self) -> float:
        """Seconds that `next` has waited for images."""
        return self._filler.wait_s

    @property
    def images(self) -> int:
        return self._tally.images

    @property
    def bad(self) -> int:
        return self._tally.bad

    @property
    def counts(self) -> dict[str, float]:
        """What this rank did so far: bytes read and fetched, cache hits and misses (blocks), bad images, seconds waited."""
        return {**asdict(self._filler.counts), "bad_images": self.bad, "wait_s": self.wait_s}

    def close(self) -> None:
        """Stop the threads; the loader cannot be used any more."""
        self._filler.close()

    def _planner(self, start: int) -> Callable[[], Plan]:
        # The order is asked here, in the consumer's thread: it is fast, and not made for several threads.
        slots = self._order.slice(start, self.units_per_batch, self._rank, self._world, self._piece)
        if self._units:
            plan = partial(plan_units, self._manifest, slots.epoch, slots.shard, slots.rows, slots.valid, seed=self._seed)
        else:
            plan = partial(plan_records, self._manifest, slots.epoch, slots.shard, slots.rows[:, 0], seed=self._seed)
        if self._views == 1:
            return plan
        return lambda: two_views(plan(), self._manifest.numbers, seed=self._seed, unlabelled=not self._units)


def evaluation_batches(
    manifest: Manifest,
    data: Data,
    *,
    rank: int = 0,
    world: int = 1,
    batch: int = 256,
    on_bad: OnBad | None = None,
    fixed: bool = False,
) -> Iterator[Batch]:
    """Every record once over all ranks, not augmented; every rank gets the same number of batches of the same size.

    The ranks' batches number b, one after the other, are the records [b * world * batch, (b + 1) * world * batch) in the
    manifest's order; what is missing at the end is padding, with `valid` False and a `sample` of (0, -1, -1). Batches of a
    small set are smaller, by the number of ranks, unless `fixed`.
    """
    batch = batch if fixed else min(batch, -(-manifest.num_samples // world))
    starts = range(0, manifest.num_samples, world * batch)
    plans = (partial(_plan_pass, manifest, start + rank * batch, batch) for start in starts)
    filler = Filler(manifest, data, Augment(), plans)
    tally = Tally(manifest, data, on_bad)
    try:
        for filled in filler:
            tally.count(filled)
            yield filled.batch
    finally:
        filler.close()


def units_per_epoch(manifest: Manifest, data: Data, histories: Sequence[History] | None = None) -> int:
    """How many positions of the stream make an epoch: records, or units of K rows, of all sources as the run found them.

    Raises ValueError when batches as `data` wants them cannot be made.
    """
    if manifest.kind == "labelled" and manifest.num_classes < 2:
        raise ValueError(f"{manifest.location!r} has {manifest.num_classes} class; telling classes apart takes at least 2")
    histories = begin(manifest) if histories is None else histories
    batch = data.batch // (data.per_class or 1)
    shares = Quotas(weights_of(manifest)).most(batch).tolist()
    total = 0
    for part, history, wanted in zip(parts_of(manifest), histories, shares, strict=True):
        if data.per_class is not None:
            _require_runs(part, data.per_class)
        if data.views == 2 and part.kind != "labelled":
            raise ValueError(
                f"data.views: 2 is for labelled data; {part.location!r} holds {part.kind} records, which have views"
            )
        there = int(unit_sizes(part, data)[: history.stages[0].num_shards].sum())
        _require_enough(part, data, wanted, there, batch)
        total += there
    return total


def _require_runs(part: Manifest, per_class: int) -> None:
    if part.kind != "labelled":
        raise ValueError(f"data.per_class is for labelled data, but {part.location!r} is of kind {part.kind!r}")
    longest = int(part.runs.length.max())
    if per_class > longest:
        raise ValueError(
            f"data.per_class {per_class} is more than the longest run of one class in {part.location!r}, {longest} "
            "images; lower it, or pack with longer runs"
        )


def _require_enough(part: Manifest, data: Data, wanted: int, there: int, batch: int) -> None:
    """A batch must not hold anything twice."""
    if wanted <= there:
        return
    what = "records" if data.per_class is None else f"runs of {data.per_class}"
    setting = "data.batch" if data.per_class is None else "data.batch / data.per_class"
    where = f"the {there} {what} of {part.location!r}"
    if wanted == batch:
        raise ValueError(f"{setting} = {batch} is more than {where}; lower data.batch or add data")
    raise ValueError(
        f"{setting} = {batch} takes up to {wanted} from one source, more than {where}; "
        "lower data.batch or the weight, or add data"
    )


def _plan_pass(manifest: Manifest, start: int, batch: int) -> Plan:
    """Records [start, start + batch) in the manifest's order, padded with the last one."""
    index = np.arange(start, start + batch, dtype=np.int64)
    real = index < manifest.num_samples
    index = np.minimum(index, manifest.num_samples - 1)
    shard = np.searchsorted(manifest.starts, index, side="right") - 1
    plan = plan_records(manifest, np.zeros_like(index), shard, index - manifest.starts[shard], seed=None)
    return mask_padding(plan, real)
