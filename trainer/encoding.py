"""What an encoder is given of a batch: images alone, or for two towers also which are whose, and the vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pipelines.batch import Batch
from trainer.encoders.towers import Towers, takes_vectors

Encoder: TypeAlias = nn.Module | Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Members:
    """Images [k, 3, S, S]; `other` [k] marks those of the positive tower; `vectors` [m, E] are its, too."""

    images: Tensor
    other: Tensor | None = None
    vectors: Tensor | None = None

    @property
    def num_vectors(self) -> int:
        return 0 if self.vectors is None else len(self.vectors)


def members_of(encoder: Encoder, parts: Sequence[Tensor], batch: Batch | None) -> list[Members]:
    """What `encoder` is given for `parts`, the images of a batch in pieces of whole records; one network takes images alone.

    Vectors are cut where the images are. Reads the batch's integers on the host.
    """
    towers = _towers(encoder)
    if towers is None or batch is None:
        return [Members(images) for images in parts]
    sizes = [len(images) for images in parts]
    view, record = batch.view, batch.record
    if batch.vectors is None or batch.place is None:
        others = torch.split(view.to(parts[0].device) != 0, sizes)
        return [Members(images, other) for images, other in zip(parts, others, strict=True)]
    by_place = batch.place.argsort()
    view, record = view[by_place], record[by_place]  # of the images, then of the vectors
    others = torch.split((view[: sum(sizes)] != 0).to(parts[0].device), sizes)
    if takes_vectors(towers.positive) and bool((view[sum(sizes) :] == 0).any()):
        raise ValueError("encoder.anchor takes images, but here are anchors that are vectors; pack the images as anchors")
    lasts = record[[end - 1 for end in torch.tensor(sizes).cumsum(0).tolist()]]  # records come in order
    ends = torch.searchsorted(record[sum(sizes) :].contiguous(), lasts, right=True).tolist()
    cuts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    vectors = [part.clone() for part in torch.split(batch.vectors.to(parts[0].device), cuts)]
    return [Members(*of) for of in zip(parts, others, vectors, strict=True)]


def encode_members(encoder: Encoder, members: Members) -> Tensor:
    """[k + m, D], of the images and then of the vectors that an encoder was given."""
    more: dict[str, Any] = {}
    if members.other is not None:
        more = {"other": members.other, "vectors": members.vectors}
    vectors: Tensor = encoder(members.images, **more)
    return vectors


def joined(found: Sequence[Tensor], members: Sequence[Members]) -> Tensor:
    """What pieces gave, in the order of a batch: all images, then all vectors."""
    pairs = [(vectors, len(one.images)) for vectors, one in zip(found, members, strict=True)]
    rest = [vectors[count:] for vectors, count in pairs] if any(one.num_vectors for one in members) else []
    return torch.cat([*(vectors[:count] for vectors, count in pairs), *rest])


def cut(rows: Tensor, members: Sequence[Members]) -> list[Tensor]:
    """The reverse of `joined`."""
    images = torch.split(rows[: sum(len(one.images) for one in members)], [len(one.images) for one in members])
    if rows.shape[0] == sum(map(len, images)):
        return list(images)
    vectors = torch.split(rows[sum(map(len, images)) :], [one.num_vectors for one in members])
    return [torch.cat(pair) for pair in zip(images, vectors, strict=True)]


def _towers(encoder: Encoder) -> Towers | None:
    """The towers, also behind DistributedDataParallel."""
    bare = getattr(encoder, "module", encoder)
    return bare if isinstance(bare, Towers) else None
