"""Multi-similarity loss: pairs weighted by themselves and by the other pairs of their anchor."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainer.losses.softmax import exp_rows_
from trainer.rows import RowLoss, Rows, Terms


class MultiSimilarity(RowLoss):
    """log(1 + sum_p exp(-alpha (s_ap - base))) / alpha + log(1 + sum_n exp(beta (s_an - base))) / beta, over mined pairs.

    Mined are negatives with s_an > min_p s_ap - epsilon and positives with s_ap < max_n s_an + epsilon. An anchor that lacks
    either has no term, but all valid queries count in the mean. Source: Wang et al. 2019, eq. 10 to 15.
    """

    temporaries = 4

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, epsilon: float = 0.1) -> None:
        super().__init__()
        self.alpha, self.beta, self.base, self.epsilon = alpha, beta, base, epsilon

    @torch.no_grad()
    def forward(self, rows: Rows) -> Terms:
        near = rows.similarity.gather(1, rows.positives).masked_fill(~rows.is_positive, torch.inf)  # [q, P]
        floor = near.amin(1, keepdim=True) - self.epsilon  # [q, 1]; inf without positives: no negative is above
        logits = rows.bar_(rows.similarity, -torch.inf)  # [q, G]
        mined = near < logits.amax(1, keepdim=True) + self.epsilon
        above = torch.threshold_(logits.sub_(floor), 0.0, -torch.inf)
        softmax, far = exp_rows_(above.add_(floor.clamp_max(torch.finfo(floor.dtype).max) - self.base).mul_(self.beta))
        pull = ((near - self.base) * -self.alpha).masked_fill(~mined, -torch.inf)
        close = pull.logsumexp(1)  # [q]
        both = (far > -torch.inf) & (close > -torch.inf)
        zero = far.new_zeros(())
        terms = torch.where(both, F.softplus(close) / self.alpha + F.softplus(far) / self.beta, zero)
        by_far, by_close = (torch.where(both, x.sigmoid(), zero)[:, None] for x in (far, close))
        share = torch.where(both[:, None], pull, torch.full_like(pull, -torch.inf)).softmax(1).nan_to_num(0.0)
        gradient = softmax.mul_(by_far).scatter_add_(1, rows.positives, -share * by_close)
        return Terms(terms.double().sum(), torch.tensor(len(near), device=near.device), gradient=gradient)
