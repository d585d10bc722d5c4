"""What an evaluation looks at: every rank embeds its share of the images, and all ranks get the vectors of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.batch import Batch
from trainer import collectives
from trainer.encoders import is_raw
from trainer.encoding import Encoder, encode_members, members_of
from trainer.frozen import with_frozen


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors [N, D] of all ranks with their groups [N] and samples [N, 3] (shard, row, view).

    `match` [N] of labelled pairs: whether the two images of the record show the same thing. `raw`: vectors of any length,
    compared by euclidean distance.
    """

    vectors: Tensor
    group: Tensor
    sample: Tensor
    match: Tensor | None = None
    uid: Tensor | None = None  # [N], the same for what is the same file
    raw: bool = False


def embed_all(encoder: Encoder, batches: Iterable[Batch], prepare: Callable[[Batch], Tensor]) -> Embedded:
    """All valid images of all ranks as vectors, on every rank, in the data set's own order. Collective."""
    return gather(embed(encoder, batches, prepare))


def gather(mine: Embedded) -> Embedded:
    """What all ranks have embedded, in the data set's own order: ties must not depend on ranks. Collective."""
    num_rows = collectives.sizes(mine.group.shape[0], mine.group.device)
    vectors, group, sample = (collectives.gather(t, num_rows) for t in (mine.vectors, mine.group, mine.sample))
    match, uid = (None if t is None else collectives.gather(t, num_rows) for t in (mine.match, mine.uid))
    order = torch.arange(sample.shape[0], device=sample.device)
    for key in (sample[:, 2], sample[:, 1], sample[:, 0]):  # the last sort counts most
        order = order[key[order].argsort(stable=True)]
    match, uid = (None if t is None else t[order] for t in (match, uid))
    return Embedded(vectors[order], group[order], sample[order], match, uid, mine.raw)


@torch.inference_mode()
def embed(encoder: Encoder, batches: Iterable[Batch], prepare: Callable[[Batch], Tensor]) -> Embedded:
    """This rank's valid images as vectors, in the order in which they come; a module's mode is put back."""
    vectors, group, sample, match, uid = [], [], [], [], []
    raw = is_raw(encoder)
    with _evaluating(encoder):
        for batch in batches:
            keep = batch.valid
            (members,) = members_of(encoder, [prepare(batch)], batch)
            found = encode_members(encoder, members)
            if batch.vectors is not None:  # given as they are, while most encoders' have length 1
                found = with_frozen(found, batch) if raw else F.normalize(with_frozen(found, batch), dim=1)
            vectors.append(found[keep.to(found.device)].float() if found.dtype != torch.float64 else found[keep])
            group.append(batch.group[keep])
            uid.append(batch.uid[keep])
            sample.append(torch.cat([batch.sample[batch.record, 1:], batch.view[:, None]], dim=1)[keep])
            if batch.match is not None:
                match.append(batch.match[batch.record][keep])
    joined = torch.cat(vectors)
    rest = [torch.cat(part).to(joined.device) if part else None for part in (group, sample, match, uid)]
    assert rest[0] is not None
    assert rest[1] is not None
    return Embedded(joined, rest[0], rest[1], rest[2], rest[3], raw)


@contextmanager
def _evaluating(encoder: Encoder) -> Iterator[None]:
    was_training = isinstance(encoder, nn.Module) and encoder.training
    if isinstance(encoder, nn.Module):
        encoder.eval()
    try:
        yield
    finally:
        if isinstance(encoder, nn.Module):
            encoder.train(was_training)
