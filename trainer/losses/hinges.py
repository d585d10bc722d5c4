"""Hinges over every (query, positive, negative), one positive at a time, so that no [q, P, G] is held."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED = 2**18  # numbers
STEEP = 2.0**60  # differences of distances times this are at least 1, or 0; raw squared distances still fit fp32


def all_hinges(bound: Tensor, far: Tensor, *, soft: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """max(0, bound - far), or softplus(bound - far), for each `bound` [q, P] and `far` [q, G]; -inf and inf give no term.

    Returns the sum (float64), its gradient by `bound` [q, P] and by `far` [q, G]. Without `soft` the former is how
    many hinges are active.
    """
    total = torch.zeros((), dtype=torch.float64, device=far.device)
    by_bound, by_far = torch.zeros_like(bound), torch.zeros_like(far)
    # On a CPU some rows at a time, so that the passes over them stay in its cache.
    num_rows = max(1, CACHED // max(1, far.shape[1])) if far.device.type == "cpu" else max(1, len(far))
    work = torch.empty_like(far[:num_rows])
    add = _add_soft if soft else _add_hinges
    for first in range(0, len(far), num_rows):
        part = slice(first, first + num_rows)
        total += add(bound[part], far[part], by_bound[part], by_far[part], work[: len(far[part])])
    return total, by_bound, by_far


def _add_hinges(bound: Tensor, far: Tensor, by_bound: Tensor, by_far: Tensor, work: Tensor) -> Tensor:
    steep = bound * STEEP
    for j in range(bound.shape[1]):
        torch.add(steep[:, j : j + 1], far, alpha=-STEEP, out=work).clamp_(0, 1)  # 1 where the hinge is active
        torch.sum(work, 1, out=by_bound[:, j])
        by_far -= work
    # The active hinges' bounds less their distances; what is barred has none, and is brought back from inf for that.
    torch.clamp(far, max=1 / torch.finfo(far.dtype).tiny ** 0.5, out=work)
    near = bound.where(bound > -torch.inf, bound.new_zeros(())).double() * by_bound.double()
    return near.sum() + work.mul_(by_far).sum(1).double().sum()


def _add_soft(bound: Tensor, far: Tensor, by_bound: Tensor, by_far: Tensor, work: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=far.device)
    for j in range(bound.shape[1]):
        torch.sub(bound[:, j : j + 1], far, out=work)  # [rows, G]
        total += F.softplus(work).sum(1).double().sum()
        by_bound[:, j] = work.sigmoid_().sum(1)
        by_far -= work
    return total
