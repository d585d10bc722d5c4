"""Distances made of similarities and squared lengths, with few passes over [q, G]."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FARTHEST_SLOPE = 1e15  # 1 / d above this is taken for that of two equal vectors, which is none
Distance = Literal["euclidean", "squared_euclidean", "cosine"]


def distances(similarity: Tensor, query_norms: Tensor, candidate_norms: Tensor, kind: Distance) -> Tensor:
    """From dot products [q, k] and squared lengths [q, 1] and [1, k] or [q, k]; -inf gives inf, with gradient 0.

    Rounding below 0 is cut off, and where the root is 0 its gradient is taken to be 0.
    """
    if kind == "cosine":
        return 1 - similarity
    found: Tensor = _Distances.apply(similarity, query_norms, candidate_norms, kind == "euclidean")  # type: ignore[no-untyped-call]
    return found


class _Distances(torch.autograd.Function):
    """|a - b|^2 = a a + b b - 2 a b, or its root."""

    @staticmethod
    def forward(ctx: Any, similarity: Tensor, query_norms: Tensor, candidate_norms: Tensor, root: bool) -> Tensor:
        found = torch.add(candidate_norms, similarity, alpha=-2).add_(query_norms).clamp_(min=0)
        if root:
            found.sqrt_()
        ctx.save_for_backward(*([found] if root else []))
        ctx.root, ctx.shapes = root, (query_norms.shape, candidate_norms.shape)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.root:  # d sqrt(x) = dx / (2 sqrt(x)), float arithmetic: masks cost several times as much on a CPU
            (found,) = ctx.saved_tensors
            slope = torch.div(found.new_tensor(-1.0), found)
            torch.threshold_(slope, -FARTHEST_SLOPE, 0.0).mul_(grad)
        else:
            slope = grad.mul(-2)
        by_query, by_candidate = (
            slope.sum_to_size(shape) * -0.5 if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad[1:3], strict=True)
        )
        return slope, by_query, by_candidate, None


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root with value and gradient 0 where x <= 0."""
    positive = x > 0
    return torch.where(positive, x, torch.ones_like(x)).sqrt() * positive
