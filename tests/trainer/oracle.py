"""Losses written once more as loops over single terms in float64, with plain autograd over the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.trainer import oracle_mined
from tests.trainer.oracle_batch import Rows, Terms, pairs


def loss(
    name: str,
    x: Tensor,
    ids: dict[str, Tensor],
    options: dict[str, Any],
    normalize: bool,
    learned: dict[str, Tensor] | None = None,
) -> Tensor:
    """Sum of terms / their number, differentiable in x [n, D] and in `learned`, the loss's parameters by name."""
    v = x / x.norm(dim=1, keepdim=True) if normalize else x
    positives, negatives = pairs(ids, explicit_for_anchors=name == "info_nce")
    rows = Rows(v, {k: t.tolist() for k, t in ids.items()}, positives, negatives, learned or {})
    terms = list(_TERMS[name](rows, **options))  # (term, how much it counts)
    count = sum(float(weight) for _, weight in terms)
    return torch.stack([term for term, _ in terms]).sum() / count if count else x.sum() * 0


def _temperature(r: Rows, temperature: float) -> Any:
    return (-r.learned["scale.log_scale"]).exp() if r.learned else temperature


def _info_nce(r: Rows, temperature: float, decoupled: bool = False, learnable: bool = False) -> Terms:
    for a, positives in r.positives.items():
        for p in positives:
            others = [r.s[a, n] / _temperature(r, temperature) for n in r.negatives[a]]
            s = r.s[a, p] / _temperature(r, temperature)
            if decoupled:
                yield torch.stack(others).logsumexp(0) - s if others else s * 0, 1
            else:
                yield torch.stack([s, *others]).logsumexp(0) - s, 1


def _sup_con(r: Rows, temperature: float, learnable: bool = False) -> Terms:
    for a, positives in r.positives.items():
        if positives:
            t = _temperature(r, temperature)
            every = torch.stack([r.s[a, c] / t for c in positives + r.negatives[a]]).logsumexp(0)
            yield torch.stack([every - r.s[a, p] / t for p in positives]).mean(), 1


def _sigmoid(r: Rows) -> Terms:
    t, b = r.learned["log_scale"].exp(), r.learned["bias"]
    for a in r.positives:
        yield r.s[a, a] * 0, 1
        for c in r.positives[a]:
            yield -F.logsigmoid(t * r.s[a, c] + b), 0
        for c in r.negatives[a]:
            yield -F.logsigmoid(-(t * r.s[a, c] + b)), 0


def _multi_similarity(r: Rows, alpha: float, beta: float, base: float, epsilon: float) -> Terms:
    for a in r.positives:
        near, far = [r.s[a, p] for p in r.positives[a]], [r.s[a, n] for n in r.negatives[a]]
        mined_far = [s for s in far if near and s > min(near) - epsilon]
        mined_near = [s for s in near if far and s < max(far) + epsilon]
        if not mined_far or not mined_near:
            yield r.s[a, a] * 0, 1
            continue
        pull = (1 + torch.stack([(-alpha * (s - base)).exp() for s in mined_near]).sum()).log() / alpha
        yield pull + (1 + torch.stack([(beta * (s - base)).exp() for s in mined_far]).sum()).log() / beta, 1


def _max_margin(r: Rows, margin: float, over: str) -> Terms:
    records = set()
    for a in r.positives:
        if r.positives[a]:
            records.add(r.ids["record"][a])
        for p in r.positives[a]:
            hinges = [(margin + r.s[a, n] - r.s[a, p]).clamp_min(0) for n in r.negatives[a]]
            for hinge in hinges if over == "sum" else [max(hinges, key=lambda h: float(h.detach()))] if hinges else []:
                yield hinge, 0
    yield r.v.sum() * 0, len(records)


def _circle(r: Rows, margin: float, scale: float) -> Terms:
    for a in r.positives:
        near, far = [r.s[a, p] for p in r.positives[a]], [r.s[a, n] for n in r.negatives[a]]
        if near and far:
            push = torch.stack([scale * (s + margin).clamp_min(0).detach() * (s - margin) for s in far]).logsumexp(0)
            pull = torch.stack([-scale * (1 + margin - s).clamp_min(0).detach() * (s - 1 + margin) for s in near]).logsumexp(0)
            yield torch.logaddexp(push + pull, push * 0), 1


def _recall_at_k(r: Rows, k: list[int], anneal: float, temperature: float) -> Terms:
    for a in r.positives:
        everyone, num = r.positives[a] + r.negatives[a], len(r.positives[a])
        if not num:
            continue
        ranks = []
        for x in r.positives[a]:
            above = [((r.s[a, z] - r.s[a, x]) / anneal).sigmoid() for z in everyone if z != x]
            ranks.append(1 + torch.stack(above).sum() if above else torch.ones(()).double())
        recall = [
            torch.stack([((one - rank) / temperature).sigmoid() for rank in ranks]).sum().clamp_max(one) / min(one, num)
            for one in k
        ]
        yield 1 - torch.stack(recall).mean(), 1


def _lifted_structure(r: Rows, margin: float, distance: str) -> Terms:
    rivals = {i: [(margin - r.d(i, k, distance)).exp() for k in r.negatives[i]] for i in r.positives}
    for i in r.positives:
        for j in r.positives[i]:
            both = rivals[i] + rivals.get(j, [])
            smooth = torch.stack(both).sum().log() + r.d(i, j, distance) if both else r.s[i, j] * 0
            yield smooth.clamp_min(0) ** 2 / 2, 1


_TERMS: dict[str, Callable[..., Terms]] = {
    "circle": _circle,
    "contrastive": oracle_mined.contrastive,
    "info_nce": _info_nce,
    "lifted_structure": _lifted_structure,
    "margin": oracle_mined.margin,
    "max_margin": _max_margin,
    "multi_similarity": _multi_similarity,
    "recall_at_k": _recall_at_k,
    "sigmoid": _sigmoid,
    "sup_con": _sup_con,
    "triplet": oracle_mined.triplet,
}
