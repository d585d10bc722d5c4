"""Losses over mined pairs and triplets, as loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from tests.trainer.oracle_batch import Rows, Terms


def triplet(r: Rows, miner: str, margin: float, distance: str, soft: bool = False, **options: Any) -> Terms:
    d = lambda a, c: float(r.d(a, c, distance).detach())  # noqa: E731
    for a, positives in r.positives.items():
        if miner == "batch_hard" and positives:
            positives = [max(positives, key=lambda c: d(a, c))]
        if options.get("pairs") == "unordered":
            positives = [p for p in positives if r.met_here(a, p)]
        for p in positives:
            for n in _chosen(r, a, p, miner, margin, d, **options):
                gap = r.d(a, p, distance) - r.d(a, n, distance)
                hinge = (gap + margin).clamp_min(0)
                only_active = options.get("mean_over", "active" if miner == "all" else "all") == "active"
                yield (1 + gap.exp()).log() if soft else hinge, 1 if soft or hinge > 0 or not only_active else 0


def _chosen(
    r: Rows, a: int, p: int, miner: str, margin: float, d: Callable[[int, int], float], pick: str = "closest", **_: Any
) -> list[int]:
    negatives, near = r.negatives[a], d(a, p)
    if not negatives or miner == "all":
        return negatives
    closest = lambda some: [min(some, key=lambda c: d(a, c))] if some else []  # noqa: E731
    farther = [n for n in negatives if d(a, n) > near]
    violating = [n for n in negatives if d(a, n) < near + margin]
    if miner == "semi_hard":
        return closest(farther) or [max(negatives, key=lambda c: d(a, c))]
    if miner == "semi_hard_within_margin":
        inside = [n for n in farther if n in violating]
        return closest(inside) if pick == "closest" else _drawn(inside, [1.0] * len(inside), r.chance(a, p))
    if miner == "random_hard":
        return _drawn(violating, [1.0] * len(violating), r.chance(a, p))
    if miner == "distance_weighted":
        return _drawn(negatives, _weights(r, a), r.chance(a, p))
    return closest(negatives) if miner == "batch_hard" else closest(violating)


def _weights(r: Rows, a: int) -> list[float]:
    dim, weights = r.v.shape[1], []
    for n in r.negatives[a]:
        d = max(float(r.d(a, n, "euclidean").detach()), 0.5)
        weights.append(d ** (2 - dim) * (1 - d * d / 4) ** ((3 - dim) / 2) if d < 1.4 else 0.0)
    return weights if any(weights) else [1.0] * len(weights)


def _drawn(columns: list[int], weights: list[float], chance: float) -> list[int]:
    left = (1 - chance) * sum(weights)
    for column, weight in zip(columns, weights, strict=True):
        left -= weight
        if left <= 1e-12 * sum(weights):
            return [column]
    return []


def contrastive(
    r: Rows,
    margin: float,
    distance: str,
    power: int = 2,
    half: bool = False,
    legacy: bool = False,
    balance: str = "none",
    weight: tuple[float, float] = (1.0, 1.0),
) -> Terms:
    positives = [(a, p) for a in r.positives for p in r.positives[a] if r.met_here(a, p)]
    negatives = [(a, n) for a in r.negatives for n in r.negatives[a] if r.met_here(a, n)]
    if balance == "hardest":
        negatives = sorted(negatives, key=lambda pair: float(r.d(*pair, distance).detach()))[: len(positives)]
    if balance == "sample":
        negatives = sorted(negatives, key=r.pair_chance)[: len(positives)]
    factor = 0.5 if half else 1.0
    for a, p in positives:
        yield factor * weight[0] * r.d(a, p, distance) ** power, 1
    for a, n in negatives:
        d = r.d(a, n, distance)
        push = (margin - d * d).clamp_min(0) if legacy else (margin - d).clamp_min(0) ** power
        yield factor * weight[1] * push, 1


def margin(r: Rows, miner: str, margin: float, distance: str) -> Terms:
    beta = r.learned["beta"]
    for a in r.positives:
        near, far = r.positives[a], r.negatives[a]
        if miner == "distance_weighted":
            chosen = [_drawn(far, _weights(r, a), r.chance(a, p)) for p in near] if far else []
            near, far = (near if far else []), list(itertools.chain(*chosen))
        for c, sign in [*((p, 1) for p in near), *((n, -1) for n in far)]:
            term = (sign * (r.d(a, c, distance) - beta) + margin).clamp_min(0)
            yield term, float(term.detach() > 0)
