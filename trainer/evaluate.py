"""Evaluation inside the workers: every rank embeds and queries its share, the result is the same on all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipelines.batch import Batch
from trainer import collectives
from trainer.metrics import means, retrieval_sums


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors [N, D] of all ranks with their groups [N] and samples [N, 2] (shard, row)."""

    vectors: Tensor
    group: Tensor
    sample: Tensor


def evaluate(encoder: nn.Module, batches: Iterable[Batch], prepare: Callable[[Batch], Tensor]) -> dict[str, float]:
    """Recall@k and MAP@R of self-retrieval over all valid images of all ranks. Collective: every rank calls it.

    `prepare` turns a batch into float images on the encoder's device.
    """
    mine = embed(encoder, batches, prepare)
    num_rows = collectives.sizes(mine.vectors.shape[0], mine.vectors.device)
    gallery = collectives.gather(mine.vectors, num_rows)
    group = collectives.gather(mine.group, num_rows)
    start = sum(num_rows[: collectives.rank()])
    index = torch.arange(start, start + mine.vectors.shape[0], device=gallery.device)
    sums = retrieval_sums(mine.vectors, mine.group, index, gallery, group)
    summed = collectives.total(torch.stack(list(sums.values())).to(gallery.device))
    return means(dict(zip(sums, summed.cpu(), strict=True)))


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
            vectors.append(found[keep.to(found.device)].float() if found.dtype != torch.float64 else found[keep])
            group.append(batch.group[keep])
            sample.append(batch.sample[batch.record[keep], 1:])
    finally:
        encoder.train(was_training)
    device = vectors[0].device
    return Embedded(torch.cat(vectors), torch.cat(group).to(device), torch.cat(sample).to(device))
