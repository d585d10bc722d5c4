"""Gradients worked out by hand, joined to what autograd does for the rest of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.distance import FARTHEST_SLOPE, Distance
from trainer.rows import Rows

Gradients = Sequence[tuple[Tensor, Tensor]]


def known(total: Tensor, gradients: Gradients) -> Tensor:
    """The scalar `total` with these gradients, pairs of (tensor, gradient by it).

    It may only be added to other terms: the gradients are handed on as they are, since scaling them costs a pass over [q, G].
    """
    joined: Tensor = _Known.apply(total, [g for _, g in gradients], *(t for t, _ in gradients))  # type: ignore[no-untyped-call]
    return joined


def through_distance_(rows: Rows, kind: Distance, slope: Tensor, distance: Tensor) -> Gradients:
    """What `slope`, the gradient by `distance` ([q, G] each, both overwritten), is by similarities and lengths.

    Where the distance is infinite or 0 there is none.
    """
    if kind == "euclidean":  # d sqrt(x) = dx / (2 sqrt(x))
        torch.div(distance.new_tensor(-1.0), distance, out=distance)
        slope.mul_(torch.threshold_(distance, -FARTHEST_SLOPE, 0.0))
    else:
        slope.mul_(-1.0 if kind == "cosine" else -2.0)
    found = [(rows.dense(), slope)]
    if kind != "cosine" and rows.candidate_norms.requires_grad:  # d^2 = q q + c c - 2 s
        found += [(rows.query_norms, slope.sum(1).mul_(-0.5)), (rows.candidate_norms, slope.sum(0).mul_(-0.5))]
    return found


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> Any:
        return None, None, *ctx.gradients
