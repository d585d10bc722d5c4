"""Where the write order is cut into chunks, so that each becomes about one full shard."""

from __future__ import annotations

from functools import partial

import numpy as np

from pipelines.chunks import Prepare, Prepared, num_threads, prepare_record
from pipelines.hashing import Int64s
from pipelines.parallel import ordered_map
from pipelines.records import Record, Records, describe
from pipelines.shards import BLOCK, member_nbytes
from pipelines.urls import StoreDown, StoreError

SAMPLED = 128  # records that are prepared beforehand where the sizes of the files do not tell
FILL = 0.9  # of a shard, where sizes are estimated: a chunk that is too long ends in a small shard


def cut(nbytes: Int64s, max_bytes: int, max_records: int | None = None) -> list[int]:
    """First places of the chunks, and the end. nbytes [n]: what each record takes; one alone may be too large."""
    ends = np.cumsum(nbytes)
    places = [0]
    while places[-1] < len(nbytes):
        start = places[-1]
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + max_bytes, side="right")))
        places.append(end if max_records is None else min(end, start + max_records))
    return places


def estimate(
    records: Records, order: Int64s, kind: str, *, sizes: Int64s | None, prepare: Prepare, transcodes: bool, threads: int
) -> Int64s:
    """Bytes that each record takes in a shard, in the write order.  order [n] -> [n]

    Exact or a little high where the files keep their bytes and `sizes` tells them; else from a sample that is prepared.
    Raises StoreDown when none of it could be fetched.
    """
    spread = np.unique(np.linspace(0, len(order) - 1, SAMPLED).astype(np.int64))
    sample = [records[i] for i in order[spread].tolist()]
    extra = max(_beside_images(kind, record) for record in sample)
    known = None if sizes is None or (sizes < 0).any() else member_nbytes(sizes).sum(axis=1)
    if known is not None and not transcodes:
        return np.asarray(known[order] + extra, dtype=np.int64)
    prepare_one = partial(prepare_record, prepare=prepare)
    prepared = list(ordered_map(prepare_one, sample, num_threads(sample, threads)))
    _refuse_silence(prepared)
    stored = np.asarray([sum(member_nbytes(len(image.data)) for image in item.images) for item in prepared], dtype=np.float64)
    good = np.asarray([not item.rejected for item in prepared])
    if known is None or not good.any():
        mean = stored[good].mean() if good.any() else float(BLOCK)
        images = np.full(len(order), mean)
    else:
        images = known[order] * (stored[good].sum() / known[order[spread]][good].sum())
    return np.asarray(np.ceil(images / FILL) + extra, dtype=np.int64)


def _beside_images(kind: str, record: Record) -> int:
    """Bytes of the `.cls` and `.json` members."""
    about = describe(kind, record)
    return (member_nbytes(1) if kind == "labelled" else 0) + (member_nbytes(len(about)) if about is not None else 0)


def _refuse_silence(prepared: list[Prepared]) -> None:
    errors = [error for item in prepared for error in item.errors]
    if all(isinstance(error, StoreError) for error in errors):
        raise StoreDown(f"none of {len(errors)} images could be fetched; the first: {prepared[0].rejected[0][0]}: {errors[0]}")
