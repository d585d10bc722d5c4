"""Regression of each image's vector to a given one."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from trainer.family import Joined
from trainer.losses.elementwise import Elementwise
from trainer.losses.given import masked_sum, pair
from trainer.objective import unit
from trainer.rows import Terms


class Regress(Elementwise):
    """Mean over valid rows of the distance between a vector and its `target` [n, E], E = D.

    `kind: mse`: squared error, averaged over the numbers (torch's MSELoss); `cosine`: 1 - cosine of both; `sigmoid_ce`:
    cross entropy of sigmoid(x) and targets in [0, 1], averaged over the numbers (torch's BCEWithLogitsLoss; Gomez et al.
    2017 regress topic probabilities so). mse and sigmoid_ce take the target as it is and usually want `normalize: false`.
    `signed`: targets of sigmoid_ce are in [-1, 1], as unit vectors are, and y counts as the probability (1 + y) / 2.
    """

    def __init__(self, kind: Literal["mse", "cosine", "sigmoid_ce"] = "mse", signed: bool = False) -> None:
        super().__init__()
        if signed and kind != "sigmoid_ce":
            raise ValueError(f"loss.signed: belongs to kind sigmoid_ce, not to {kind!r}; leave it out")
        self.kind, self.signed = kind, signed

    def terms(self, x: Tensor, batch: Joined) -> Terms:
        target = needed_target(x, batch, "regress")
        if target.shape != x.shape:
            raise ValueError(
                f"regress: the target has {target.shape[1]} numbers a row, the vectors have {x.shape[1]}; "
                "set encoder.dim to the target's size"
            )
        valid, similarity = batch.ids.valid == 1, (unit(x) * unit(target)).sum(1)  # [n]
        if self.kind == "cosine":
            terms = 1 - similarity
        elif self.kind == "mse":
            terms = (x - target).square().mean(1)
        else:
            target = (1 + target) / 2 if self.signed else target
            if target.device.type == "cpu" and bool(((target < 0) | (target > 1)).any()):  # a GPU would have to be waited for
                raise ValueError(
                    "regress: targets of sigmoid_ce are probabilities, in [0, 1]; for vectors of numbers in [-1, 1] set "
                    "loss.signed: true"
                )
            terms = F.binary_cross_entropy_with_logits(x, target, reduction="none").mean(1)
        return Terms(masked_sum(terms, valid), valid.sum(), {"target_similarity": pair(similarity, valid)})


def needed_target(x: Tensor, batch: Joined, loss: str) -> Tensor:
    """`target` [n, E] in x's type. Raises ValueError without one."""
    if batch.target is None:
        raise ValueError(
            f"{loss} needs a target vector for every row: pack records with a target (a column `target` of a table, "
            "`<key>.target.npy` in a tar), or give `target` to the objective"
        )
    if batch.target.ndim != 2:
        raise ValueError(f"target: expected shape [{len(x)}, E], got {list(batch.target.shape)}")
    return batch.target.detach().to(x.dtype)
