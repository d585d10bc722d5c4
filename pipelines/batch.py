"""What travels from the loader to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

NUM_DRAWS = 32  # uniform random numbers that travel with every image, for augmentation on the device


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's slice of a global batch: n rows that belong to R records. Every row is an image, unless `vectors` are given.

    The integers say which rows may be compared: equal `group` = the same thing, equal `uid` = the same image,
    `view` = 0 anchor, 1 positive, 2.. explicit negatives (P x K: 0 for a unit's first row, 1 for the rest),
    `record` = 0..R-1 on this rank (a labelled image is a record of its own), `valid` = False for corrupt rows and padding.
    With `vectors`, k = n - m rows are images, and row i is number `place[i]` of the images followed by the vectors.
    """

    images: Tensor  # [k, 3, H, W] uint8, channels last in memory
    group: Tensor  # [n] int64
    uid: Tensor  # [n] int64
    view: Tensor  # [n] int64
    record: Tensor  # [n] int64
    valid: Tensor  # [n] bool
    draws: Tensor  # [k, NUM_DRAWS] float32 in [0, 1), a function of (seed, epoch, uid, record's row, view) only
    sample: Tensor  # [R, 3] int64: (epoch, shard, row) of each record
    match: Tensor | None = None  # [R] int64 {0, 1}, labelled pairs
    weight: Tensor | None = None  # [R] float32
    vectors: Tensor | None = None  # [m, E] float32, rows that are given instead of encoded
    place: Tensor | None = None  # [n] int64
    target: Tensor | None = None  # [n, E] float32, what every row's record is to be compared with: for regress and distill

    @property
    def num_images(self) -> int:
        return self.images.shape[0]

    @property
    def num_rows(self) -> int:
        return self.group.shape[0]

    @property
    def num_records(self) -> int:
        return self.sample.shape[0]

    def to(self, device: torch.device) -> Batch:
        """Copy to `device` without waiting for it when the tensors are pinned."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})

    def pin(self) -> Batch:
        """Page-locked copies of all tensors, so that `to` overlaps with compute."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in tensors.items() if v is not None})


def join(parts: Sequence[Batch], *, pinned: bool = False) -> Batch:
    """One behind the other, in memory of its own; the images page-locked if `pinned`. Records are counted on."""
    records, images, vectors = 0, 0, sum(part.num_images for part in parts)
    moved = []
    for part in parts:
        place = part.place
        if place is not None:  # all images come first, then all vectors
            place = torch.where(place < part.num_images, place + images, place - part.num_images + vectors)
        moved.append(replace(part, record=part.record + records, place=place))
        records, images = records + part.num_records, images + part.num_images
        vectors += 0 if part.vectors is None else len(part.vectors)
    joined: dict[str, Any] = {}
    for field in fields(Batch):
        tensors = [getattr(part, field.name) for part in moved]
        joined[field.name] = None if tensors[0] is None else torch.cat(tensors) if field.name != "images" else None
    _, _, height, width = parts[0].images.shape
    pixels = torch.empty((images, height, width, 3), dtype=torch.uint8, pin_memory=pinned)
    torch.cat([part.images.permute(0, 2, 3, 1) for part in parts], out=pixels)
    return Batch(**{**joined, "images": pixels.permute(0, 3, 1, 2)})
