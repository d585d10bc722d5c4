"""Evaluation inside the workers: every rank embeds and queries its share, the result is the same on all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.batch import Batch
from trainer import collectives
from trainer.frozen import with_frozen
from trainer.metrics import means, retrieval_sums

QUERIES = 1024  # searched together where sums must not depend on the number of ranks


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors [N, D] of all ranks with their groups [N] and samples [N, 3] (shard, row, view)."""

    vectors: Tensor
    group: Tensor
    sample: Tensor


def evaluate(
    encoder: nn.Module, batches: Iterable[Batch], prepare: Callable[[Batch], Tensor], *, reproducible: bool = False
) -> dict[str, float]:
    """Recall@k and MAP@R of self-retrieval over all valid images of all ranks. Collective: every rank calls it.

    `prepare` turns a batch into float images on the encoder's device. `reproducible`: to the last bit on any number of
    ranks, when the batches are alike on any.
    """
    gallery = gather(embed(encoder, batches, prepare))
    if reproducible:
        return means(_sums_by_blocks(gallery))
    size, rank, world = gallery.group.shape[0], collectives.rank(), collectives.world()
    queries = torch.arange(size * rank // world, size * (rank + 1) // world, device=gallery.group.device)
    sums = retrieval_sums(*_queries(gallery, queries))
    summed = collectives.total(torch.stack(list(sums.values())).to(queries.device))
    return means(dict(zip(sums, summed.cpu(), strict=True)))


def _sums_by_blocks(gallery: Embedded) -> dict[str, Tensor]:
    """`retrieval_sums` over all queries, added up in their order. Collective: every rank calls it."""
    device = gallery.group.device
    blocks = torch.split(torch.arange(len(gallery.group), device=device), QUERIES)
    world = collectives.world()
    borders = [len(blocks) * r // world for r in range(world + 1)]
    found, names = [], list(retrieval_sums(*_queries(gallery, blocks[0][:0])))
    for block in blocks[borders[collectives.rank()] : borders[collectives.rank() + 1]]:
        found.append(torch.stack(list(retrieval_sums(*_queries(gallery, block)).values())))
    mine = torch.stack(found) if found else torch.zeros((0, len(names)), dtype=torch.float64)
    every = collectives.gather(mine.to(device), [end - first for first, end in itertools.pairwise(borders)])
    return dict(zip(names, every.cpu().sum(0), strict=True))


def _queries(gallery: Embedded, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return gallery.vectors[rows], gallery.group[rows], rows, gallery.vectors, gallery.group


def gather(mine: Embedded) -> Embedded:
    """What all ranks have embedded, in the data set's own order: ties must not depend on ranks. Collective."""
    num_rows = collectives.sizes(mine.group.shape[0], mine.group.device)
    vectors, group, sample = (collectives.gather(t, num_rows) for t in (mine.vectors, mine.group, mine.sample))
    order = torch.arange(sample.shape[0], device=sample.device)
    for key in (sample[:, 2], sample[:, 1], sample[:, 0]):  # the last sort counts most
        order = order[key[order].argsort(stable=True)]
    return Embedded(vectors[order], group[order], sample[order])


@torch.inference_mode()
def embed(encoder: nn.Module, batches: Iterable[Batch], prepare: Callable[[Batch], Tensor]) -> Embedded:
    """This rank's valid images as vectors, in the order in which they come; the encoder's mode is put back."""
    was_training = encoder.training
    encoder.eval()
    vectors, group, sample = [], [], []
    try:
        for batch in batches:
            keep = batch.valid
            found = encoder(prepare(batch))
            if batch.vectors is not None:  # given as they are, while an encoder's have length 1
                found = F.normalize(with_frozen(found, batch), dim=1)
            vectors.append(found[keep.to(found.device)].float() if found.dtype != torch.float64 else found[keep])
            group.append(batch.group[keep])
            sample.append(torch.cat([batch.sample[batch.record, 1:], batch.view[:, None]], dim=1)[keep])
    finally:
        encoder.train(was_training)
    device = vectors[0].device
    return Embedded(torch.cat(vectors), torch.cat(group).to(device), torch.cat(sample).to(device))
