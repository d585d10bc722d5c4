"""Losses written once more as loops over single terms in float64, with plain autograd over the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pairs(ids: dict[str, Tensor], *, explicit_for_anchors: bool) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Positives and negatives of every query row, from the rules in words (see trainer/rows.py)."""
    n = len(ids["group"])
    positives: dict[int, list[int]] = {}
    negatives: dict[int, list[int]] = {}
    get = {k: v.tolist() for k, v in ids.items()}
    for q in range(n):
        if get["view"][q] > 1 or not get["valid"][q]:
            continue
        positives[q], negatives[q] = [], []
        for c in range(n):
            if not get["valid"][c]:
                continue
            explicit = get["view"][c] >= 2
            if explicit_for_anchors and explicit and get["view"][q] != 0:
                continue
            same_record = get["record"][q] == get["record"][c] and get["view"][q] != get["view"][c]
            own_negative = same_record and (explicit and get["view"][q] == 0)
            if get["group"][q] == get["group"][c] and not own_negative:
                if get["uid"][q] != get["uid"][c] or same_record:
                    positives[q].append(c)
            elif get["uid"][q] != get["uid"][c]:
                negatives[q].append(c)
    return positives, negatives


def loss(name: str, x: Tensor, ids: dict[str, Tensor], options: dict[str, Any], normalize: bool) -> Tensor:
    """The mean over all terms, differentiable in x [n, D]."""
    v = x / x.norm(dim=1, keepdim=True) if normalize else x
    positives, negatives = pairs(ids, explicit_for_anchors=name == "info_nce")
    terms = list(_TERMS[name](v, positives, negatives, ids["uid"].tolist(), **options))
    return torch.stack(terms).mean() if terms else x.sum() * 0


def _info_nce(v, positives, negatives, uid, temperature, decoupled=False):  # type: ignore[no-untyped-def]
    for a in positives:
        for p in positives[a]:
            others = [(v[a] @ v[n]) / temperature for n in negatives[a]]
            s = (v[a] @ v[p]) / temperature
            if decoupled:
                yield torch.stack(others).logsumexp(0) - s if others else s * 0
            else:
                yield torch.stack([s, *others]).logsumexp(0) - s


def _sup_con(v, positives, negatives, uid, temperature):  # type: ignore[no-untyped-def]
    for a in positives:
        if positives[a]:
            every = torch.stack([(v[a] @ v[c]) / temperature for c in positives[a] + negatives[a]]).logsumexp(0)
            yield torch.stack([every - (v[a] @ v[p]) / temperature for p in positives[a]]).mean()


def _distance(a: Tensor, b: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return 1 - a @ b
    squared = ((a - b) ** 2).sum()
    return squared if kind == "squared_euclidean" else squared.sqrt() if squared > 1e-24 else squared * 0


def _triplet(v, positives, negatives, uid, margin, miner, distance, soft=False):  # type: ignore[no-untyped-def]
    def hinge(d_ap: Tensor, d_an: Tensor) -> Tensor:
        return (1 + (d_ap - d_an).exp()).log() if soft else (d_ap - d_an + margin).clamp_min(0)

    for a in positives:
        d = {c: _distance(v[a], v[c], distance) for c in positives[a] + negatives[a]}
        if not positives[a] or not negatives[a]:
            continue
        by_uid = sorted(negatives[a], key=lambda c: uid[c])
        if miner == "batch_hard":
            p = max(sorted(positives[a], key=lambda c: uid[c]), key=lambda c: float(d[c].detach()))
            yield hinge(d[p], d[min(by_uid, key=lambda c: float(d[c].detach()))])
            continue
        for p in positives[a]:
            farther = [n for n in by_uid if float(d[n].detach()) > float(d[p].detach())]
            n = min(farther, key=lambda c: float(d[c].detach())) if farther else max(by_uid, key=lambda c: float(d[c].detach()))
            yield hinge(d[p], d[n])


_TERMS = {"info_nce": _info_nce, "sup_con": _sup_con, "triplet": _triplet}
