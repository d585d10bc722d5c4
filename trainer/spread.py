"""How the vectors lie on the sphere, whatever is searched for among them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.pairs import Pairs

AT_ONCE = 65536  # vectors


def alignment(same: Tensor) -> float:
    """Mean squared distance of two images of the same thing, from their cosines [S] (Wang and Isola 2020); small is good."""
    return float((2 - 2 * same.double()).clamp(min=0).mean())


def uniformity(pairs: Pairs) -> float:
    """Logarithm of the mean of exp(-2 d^2) over all pairs (Wang and Isola 2020); small is good, 0 when all is one point."""
    total = _potential(pairs.same) * pairs.num_same + _potential(pairs.different) * pairs.num_different
    return math.log(total / (pairs.num_same + pairs.num_different))


def effective_rank(vectors: Tensor) -> float:
    """How many dimensions vectors [N, D] use: exp of the entropy of the singular values' shares (Roy and Vetterli 2007)."""
    factor = vectors[:0].double()
    for part in torch.split(vectors, AT_ONCE):  # R of the QR decomposition has the singular values of all that went into it
        factor = torch.linalg.qr(torch.cat([factor, part.double()]), mode="r").R
    values = torch.linalg.svdvals(factor)
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def _potential(score: Tensor) -> float:
    return float((-2 * (2 - 2 * score.double())).exp().mean()) if len(score) else 0.0
