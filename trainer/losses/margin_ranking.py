"""The margin ranking loss over given triplets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainer.family import Joined
from trainer.losses.given import Given, masked_sum, pair
from trainer.rows import Terms, fraction


class MarginRanking(Given):
    """max(0, -y (s_1 - s_2) + margin), s_1 = anchor with view 1, s_2 = anchor with view 2.., y = 2 match - 1.

    y is 1 without `match`: view 1 should be nearer. One term per row of view 2 or above. Source: torch's
    MarginRankingLoss on similarities.
    """

    last_view = 2

    def __init__(self, margin: float = 0.0) -> None:
        super().__init__()
        self.margin = margin

    def terms(self, x: Tensor, batch: Joined) -> Terms:
        anchor, positive, exists = self.rows(batch.ids)
        first, second = (x[anchor] * x[positive]).sum(1), (x[anchor] * x).sum(1)  # [n] each
        y = (2 * batch.ids.match - 1).to(x.dtype)
        terms = F.relu(-y * (first - second) + self.margin)
        stats = {
            "first_similarity": pair(first, exists),
            "second_similarity": pair(second, exists),
            "active_fraction": fraction(terms.detach() > 0, exists),
        }
        return Terms(masked_sum(terms, exists), exists.sum(), stats)
