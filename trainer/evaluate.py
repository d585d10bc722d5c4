"""Evaluation inside the workers: every rank embeds and queries its share, the result is the same on all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.batch import Batch
from trainer import collectives
from trainer.frozen import with_frozen
from trainer.metrics import means, retrieval_sums


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors [N, D] of all ranks with their groups [N] and samples [N, 3] (shard, row, view)."""

    vectors: Tensor
    group: Tensor
    sample: Tensor


def evaluate(encoder: nn.Module, batches: Iterable[Batch], prepare: Callable[[Batch], Tensor]) -> dict[str, float]:
    """Recall@k and MAP@R of self-retrieval over all valid images of all ranks. Collective: every rank calls it.

    `prepare` turns a batch into float images on the encoder's device.
    """
    gallery = gather(embed(encoder, batches, prepare))
    size, rank, world = gallery.group.shape[0], collectives.rank(), collectives.world()
    queries = torch.arange(size * rank // world, size * (rank + 1) // world, device=gallery.group.device)
    sums = retrieval_sums(gallery.vectors[queries], gallery.group[queries], queries, gallery.vectors, gallery.group)
    summed = collectives.total(torch.stack(list(sums.values())).to(queries.device))
    return means(dict(zip(sums, summed.cpu(), strict=True)))


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
