"""Losses of given records, targets and class centres once more, as loops over single terms with plain autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _distance(a: Tensor, b: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return 1 - a @ b
    squared = ((a - b) ** 2).sum()
    return squared if kind == "squared_euclidean" or squared == 0 else squared.sqrt()


def records(ids: dict[str, Tensor]) -> list[tuple[dict[int, int], int]]:
    """(row of every view, match) of every record."""
    found: dict[int, dict[int, int]] = {}
    for row, (record, view) in enumerate(zip(ids["record"].tolist(), ids["view"].tolist(), strict=True)):
        found.setdefault(record, {})[view] = row
    return [(rows, int(ids["match"][record])) for record, rows in sorted(found.items())]


def given(name: str, x: Tensor, ids: dict[str, Tensor], **options: Any) -> Tensor:
    """Mean of `name`'s terms over the pairs or triplets whose rows are all valid."""
    terms: list[Tensor] = []
    for rows, match in records(ids):
        for view, row in rows.items():
            members = [rows.get(0), rows.get(1), row]
            if None in members or not all(ids["valid"][m] for m in members):
                continue
            a, p, n = (x[m] for m in members)
            if name in ("contrastive", "cosine_embedding") and view == 1:
                terms.append(_PAIRS[name](a, p, match, **options))
            if name in ("triplet", "margin_ranking") and view >= 2:
                terms.append(_TRIPLETS[name](a, p, n, match, **options))
    return torch.stack(terms).mean()


def _contrastive(a, b, match, margin, distance, power=2, half=False, legacy=False, weight=(1, 1)):  # type: ignore[no-untyped-def]
    d = _distance(a, b, distance)
    far = (margin - d**2).clamp_min(0) if legacy else (margin - d).clamp_min(0) ** power
    return (weight[0] * d**power if match else weight[1] * far) * (0.5 if half else 1)


def _cosine_embedding(a, b, match, margin=0.0):  # type: ignore[no-untyped-def]
    s = a @ b / (a.norm() * b.norm())
    return 1 - s if match else (s - margin).clamp_min(0)


def _triplet(a, p, n, match, margin, distance, p_norm=2.0, eps=1e-6, swap=False, half=False, soft=False):  # type: ignore[no-untyped-def]
    def d(u: Tensor, v: Tensor) -> Tensor:
        if distance == "euclidean":
            return ((u - v + eps).abs() ** p_norm).sum() ** (1 / p_norm)
        return _distance(u, v, distance)

    far = d(a, n)
    if swap:
        far = min(far, d(p, n))
    gap = d(a, p) - far
    return ((1 + gap.exp()).log() if soft else (gap + margin).clamp_min(0)) * (0.5 if half else 1)


def _margin_ranking(a, p, n, match, margin=0.0):  # type: ignore[no-untyped-def]
    return (-(2 * match - 1) * (a @ p - a @ n) + margin).clamp_min(0)


_PAIRS = {"contrastive": _contrastive, "cosine_embedding": _cosine_embedding}
_TRIPLETS = {"triplet": _triplet, "margin_ranking": _margin_ranking}


def regress(x: Tensor, target: Tensor, valid: Tensor, kind: str) -> Tensor:
    terms = []
    for row in valid.nonzero()[:, 0].tolist():
        v, t = x[row], target[row]
        if kind == "mse":
            terms.append(((v - t) ** 2).mean())
        elif kind == "cosine":
            terms.append(1 - v @ t / (v.norm() * t.norm()))
        else:
            terms.append(-(t * v.sigmoid().log() + (1 - t) * (1 - v.sigmoid()).log()).mean())
    return torch.stack(terms).mean()


def distill(x: Tensor, target: Tensor, valid: Tensor, kind: str, temperature: float = 0.1) -> Tensor:
    """`x` as used, targets scaled to unit length."""
    if kind == "vector":
        return regress(x, target, valid, "cosine")
    target = target / target.norm(dim=1, keepdim=True)
    rows, terms = valid.nonzero()[:, 0].tolist(), []
    for i in rows:
        others = [j for j in rows if j != i]
        s, t = (torch.stack([m[i] @ m[j] for j in others]) for m in (x, target))
        if kind == "similarity":
            terms.extend((s - t) ** 2)
        else:
            q = (t / temperature).exp() / (t / temperature).exp().sum()
            p = (s / temperature).exp() / (s / temperature).exp().sum()
            terms.append((q * (q / p).log()).sum())
    return torch.stack(terms).mean()


def softmax(x: Tensor, labels: list[int | None], weight: Tensor, bias: Tensor) -> Tensor:
    """labels: class of every row, None for rows left out."""
    terms = []
    for row, y in enumerate(labels):
        if y is not None:
            logits = torch.stack([weight[c] @ x[row] + bias[c] for c in range(len(weight))])
            terms.append(logits.logsumexp(0) - logits[y])
    return torch.stack(terms).mean()


def arcface(
    x: Tensor, labels: list[int | None], weight: Tensor, margins: list[float], scale: float, sub_centers: int = 1
) -> Tensor:
    v, w = F.normalize(x), F.normalize(weight)
    terms = []
    for row, y in enumerate(labels):
        if y is None:
            continue
        cosines = []
        for c in range(len(w) // sub_centers):
            near = max((v[row] @ w[c * sub_centers + k] for k in range(sub_centers)), key=lambda s: float(s.detach()))
            if c == y:
                angle, m = near.arccos(), margins[c]
                near = (angle + m).cos() if float(angle.detach()) + m <= math.pi else near - m * math.sin(m)
            cosines.append(near * scale)
        logits = torch.stack(cosines)
        terms.append(logits.logsumexp(0) - logits[y])
    return torch.stack(terms).mean()


def proxy_anchor(x: Tensor, labels: list[int | None], weight: Tensor, margin: float, alpha: float) -> Tensor:
    v, w = F.normalize(x), F.normalize(weight)
    pull, push = [], []
    for c in range(len(w)):
        own = [v[row] @ w[c] for row, y in enumerate(labels) if y == c]
        others = [v[row] @ w[c] for row, y in enumerate(labels) if y is not None and y != c]
        if own:
            pull.append((1 + sum((-alpha * (s - margin)).exp() for s in own)).log())
        push.append((1 + sum((alpha * (s + margin)).exp() for s in others)).log())  # type: ignore[union-attr]
    return torch.stack(pull).mean() + torch.stack(push).mean()
