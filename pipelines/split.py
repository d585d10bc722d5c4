"""Which records are for evaluation, and in which order the rest is written."""

from __future__ import annotations

import numpy as np

from pipelines.hashing import Int64s, permutation

_TAG_SPLIT, _TAG_ROWS, _TAG_RUNS = 101, 102, 103  # keep the shuffles apart from each other and from order.py's


def split_records(entities: Int64s, kind: str, fraction: float, split: str, seed: int) -> tuple[Int64s, Int64s]:
    """Indices of the records to train on and to evaluate on.  entities [n]: the number of every record's entity

    split = class: an entity (class, or group of a pair) is on one side only. record: of every class a share on each side.
    Raises ValueError when a side would be left without anything to compare.
    """
    num_entities = int(entities.max()) + 1
    if split == "class":
        least = 2 if kind == "labelled" else 1
        if num_entities < 2 * least:
            what = "classes" if kind == "labelled" else "records or groups"
            raise ValueError(
                f"{num_entities} {what} cannot be split by class: training and evaluation need {least} each; use --split record"
            )
        count = min(max(round(fraction * num_entities), least), num_entities - least)
        chosen = np.zeros(num_entities, dtype=bool)
        chosen[permutation(num_entities, seed, _TAG_SPLIT)[:count]] = True
        held_out = chosen[entities]
    else:
        held_out = _every_nth(entities, fraction, seed)
        if held_out.all() or not held_out.any():
            raise ValueError(f"an evaluation fraction of {fraction} of {len(entities)} records leaves one side empty")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def write_order(entities: Int64s, indices: Int64s, kind: str, run_rows: int, seed: int) -> Int64s:
    """`indices` in the order in which they are written: labelled data in shuffled runs of one class, the rest shuffled."""
    shuffled = indices[permutation(len(indices), seed, _TAG_ROWS)]
    if kind != "labelled":
        return shuffled
    entities = entities[shuffled]
    by_class = np.argsort(entities, kind="stable")
    entities, shuffled = entities[by_class], shuffled[by_class]
    first_of_class = np.searchsorted(entities, entities)
    place = np.arange(len(entities)) - first_of_class  # within its class
    starts_run = place % run_rows == 0
    run = np.cumsum(starts_run) - 1
    rank_of_run = np.empty(int(run[-1]) + 1, dtype=np.int64)
    rank_of_run[permutation(len(rank_of_run), seed, _TAG_RUNS)] = np.arange(len(rank_of_run))
    return np.asarray(shuffled[np.argsort(rank_of_run[run], kind="stable")], dtype=np.int64)


def _every_nth(entities: Int64s, fraction: float, seed: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Systematic sampling over the records sorted by entity, shuffled within: each entity gives its share, to within one."""
    shuffle = permutation(len(entities), seed, _TAG_SPLIT)
    order = shuffle[np.argsort(entities[shuffle], kind="stable")]
    steps = np.floor(np.arange(len(order) + 1) * fraction + 0.5).astype(np.int64)
    held_out = np.zeros(len(order), dtype=bool)
    held_out[order] = np.diff(steps) > 0
    return held_out
