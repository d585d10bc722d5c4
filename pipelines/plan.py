"""What a batch is made of, before any image is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipelines.augment import draws
from pipelines.batch import NUM_DRAWS
from pipelines.hashing import Int64s
from pipelines.manifest import Manifest
from pipelines.samples import TARGET

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Plan:
    """n members (images, vectors, targets) of R records: where they lie and everything that goes with them."""

    shard: Int64s  # [n]
    row: Int64s  # [n] of the record in the shard
    offset: Int64s  # [n]
    size: Int64s  # [n]
    crc32: Int64s  # [n]
    uid: Int64s  # [n]
    group: Int64s  # [n]
    view: Int64s  # [n] TARGET: no row of the batch
    record: Int64s  # [n]
    present: Bools  # [n] False for padding and for what the manifest calls bad: not read at all
    draws: NDArray[np.float32]  # [n, NUM_DRAWS]
    sample: Int64s  # [R, 3] (epoch, shard, row); (0, -1, -1) for padding
    match: Int64s | None  # [R]
    weight: NDArray[np.float32] | None  # [R]
    dim: Int64s | None = None  # [n] numbers of a vector, 0 for an image; None: images only

    @property
    def num_members(self) -> int:
        return len(self.uid)


def plan_records(manifest: Manifest, epoch: Int64s, shard: Int64s, row: Int64s, *, seed: int | None) -> Plan:
    """All members of the given records, those of a record side by side. Without a seed the draws are 0.  [R] each"""
    tables = {number: manifest.table(number) for number in np.unique(shard).tolist()}
    first, count = np.empty_like(row), np.empty_like(row)
    match, weight, bad = np.empty_like(row), np.empty(len(row), np.float32), np.empty(len(row), np.bool_)
    for number, table in tables.items():
        here = shard == number
        rows = row[here]
        first[here], count[here] = table.start[rows], table.start[rows + 1] - table.start[rows]
        match[here], weight[here], bad[here] = table.match[rows], table.weight[rows], table.bad[rows]
    record = np.repeat(np.arange(len(row)), count)  # [n]
    image = first[record] + np.arange(len(record)) - np.repeat(np.cumsum(count) - count, count)  # in its shard's table
    names = ["offset", "size", "crc32", "uid", "group", "view", *(["dim"] if manifest.has_vectors else [])]
    fields = {name: np.empty(len(record), np.int64) for name in names}
    for number, table in tables.items():
        here = shard[record] == number
        for name, field in fields.items():
            field[here] = getattr(table, name)[image[here]]
    drawn = np.zeros((len(record), NUM_DRAWS), np.float32)
    if seed is not None:
        drawn = draws(seed, epoch[record], fields["uid"], (manifest.numbers[shard] + row)[record], fields["view"])
    return Plan(
        shard=shard[record],
        row=row[record],
        record=record,
        present=~bad[record],
        draws=drawn,
        sample=np.stack([epoch, shard, row], axis=1),
        match=match if manifest.kind == "labelled_pair" else None,
        weight=weight if manifest.weighted else None,
        **fields,
    )


def plan_units(manifest: Manifest, epoch: Int64s, shard: Int64s, rows: Int64s, valid: Bools, *, seed: int) -> Plan:
    """U units of K rows of one class, every row a record of its own: view 0 the first, 1 the rest.  [U], [U], [U, K], [U, K]

    Rows of a unit are no views of one record, so that the same image twice in a class is never its own positive.
    """
    per_class = rows.shape[1]
    plan = plan_records(manifest, np.repeat(epoch, per_class), np.repeat(shard, per_class), rows.reshape(-1), seed=seed)
    number = plan.record  # of the row in all units; a target has that of its image
    view = np.where(plan.view == TARGET, TARGET, (number % per_class > 0).astype(np.int64))
    return replace(
        plan,
        view=view,
        present=plan.present & valid.reshape(-1)[number],
        draws=draws(seed, np.repeat(epoch, per_class)[number], plan.uid, manifest.numbers[plan.shard] + plan.row, view),
    )


def two_views(plan: Plan, numbers: Int64s, *, seed: int, unlabelled: bool) -> Plan:
    """Every image twice, as views 0 and 1 of its record, each with draws of its own; targets stay as they are.

    `numbers` [M]: of each shard's first record (`Manifest.numbers`). `unlabelled`: only the same image is the same thing.
    """
    index = np.repeat(np.arange(plan.num_members), np.where(plan.view == TARGET, 1, 2))
    second = np.concatenate([[False], index[1:] == index[:-1]]).astype(np.int64)
    of_images = {
        name: getattr(plan, name)[index]
        for name in ("shard", "row", "offset", "size", "crc32", "uid", "group", "record", "present")
    }
    is_target, uid, record = plan.view[index] == TARGET, of_images["uid"], of_images["record"]
    view = np.where(is_target, TARGET, second)
    if unlabelled:
        of_images["group"] = uid
    return replace(
        plan,
        view=view,
        draws=draws(seed, plan.sample[record, 0], uid, numbers[of_images["shard"]] + of_images["row"], view),
        dim=None if plan.dim is None else plan.dim[index],
        **of_images,
    )


def mask_padding(plan: Plan, real: Bools) -> Plan:
    """Mark records that only fill a batch up.  real: [R]"""
    sample = np.where(real[:, None], plan.sample, np.asarray([0, -1, -1]))
    return replace(plan, present=plan.present & real[plan.record], sample=sample)
