"""A batch as the loops of the oracles see it: who is whose positive and negative, distances, random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Terms = Iterator[tuple[Tensor, float]]  # of a loss: each term, and how much it counts
MASK = 2**64 - 1
STEP = 11  # of the objective, which seeds what is random


@dataclass
class Rows:
    """A batch in words: who is whose positive and negative, queries only, candidates in the order of (uid, view, record)."""

    v: Tensor  # [n, D] as used
    ids: dict[str, list[int]]
    positives: dict[int, list[int]]
    negatives: dict[int, list[int]]
    learned: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.s = self.v @ self.v.T
        self._distances: dict[str, Tensor] = {}

    def d(self, a: int, b: int, kind: str) -> Tensor:
        if kind not in self._distances:
            squared = ((self.v[:, None] - self.v[None]) ** 2).sum(2)
            near = squared < 1e-24
            euclidean = squared.masked_fill(near, 1).sqrt() * ~near
            self._distances[kind] = {"cosine": 1 - self.s, "squared_euclidean": squared, "euclidean": euclidean}[kind]
        return self._distances[kind][a, b]

    def key(self, i: int) -> tuple[int, int, int]:
        return self.ids["uid"][i], self.ids["view"][i], self.ids["record"][i]

    def met_here(self, i: int, j: int) -> bool:
        """Whether i owns the unordered pair: the lower view, then the lower uid; a row that is no query owns nothing."""
        return j not in self.positives or (self.ids["view"][i], self.key(i)) < (self.ids["view"][j], self.key(j))

    def chance(self, i: int, j: int) -> float:
        return _uniform(STEP, *self.key(i)[:2], *self.key(j)[:2])

    def pair_chance(self, pair: tuple[int, int]) -> float:
        return (_mix(sum(_hash(STEP, *self.key(i)[:2]) for i in pair) & MASK) >> 11) / 2**53


def pairs(ids: dict[str, Tensor], *, explicit_for_anchors: bool) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Positives and negatives of every query row, from the rules in words (see trainer/rows.py)."""
    n = len(ids["group"])
    positives: dict[int, list[int]] = {}
    negatives: dict[int, list[int]] = {}
    get = {k: v.tolist() for k, v in ids.items()}
    order = sorted(range(n), key=lambda i: (get["uid"][i], get["view"][i], get["record"][i]))
    for q in range(n):
        if get["view"][q] > 1 or not get["valid"][q]:
            continue
        positives[q], negatives[q] = [], []
        for c in order:
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


def _uniform(*keys: int) -> float:
    return (_hash(*keys) >> 11) / 2**53


def _hash(*keys: int) -> int:
    """SplitMix64 over the keys, in Python's own integers."""
    h = 0
    for key in keys:
        h = _mix((h + key + 0x9E3779B97F4A7C15) & MASK)
    return h


def _mix(h: int) -> int:
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & MASK
    return h ^ (h >> 31)
