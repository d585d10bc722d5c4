"""The cosine embedding loss over given pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.family import Joined
from trainer.losses.given import Given, masked_sum, pair
from trainer.objective import unit
from trainer.rows import Terms


class CosineEmbedding(Given):
    """1 - s for pairs that match, max(0, s - margin) for the others, s the cosine, whatever `normalize` says.

    Mean over pairs (views 0 and 1 of a record). Source: torch's CosineEmbeddingLoss, where match is 1 and -1.
    """

    def __init__(self, margin: float = 0.0) -> None:
        super().__init__()
        self.margin = margin

    def terms(self, x: Tensor, batch: Joined) -> Terms:
        anchor, _, exists = self.rows(batch.ids)
        similar, v = batch.ids.match == 1, unit(x)
        s = (v[anchor] * v).sum(1)  # [n]
        terms = torch.where(similar, 1 - s, F.relu(s - self.margin))
        stats = {"positive_similarity": pair(s, exists & similar), "negative_similarity": pair(s, exists & ~similar)}
        return Terms(masked_sum(terms, exists), exists.sum(), stats)
