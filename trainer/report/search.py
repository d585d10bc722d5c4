"""Every image of the evaluation set searched among all others, exactly and in chunks: never an [N, N] matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.euclidean import lifted, minus_distance


@dataclass(frozen=True, slots=True)
class Search:
    """What N rows find. A row itself never counts; where there is nothing, a row number is -1 and a cosine -inf.

    Of raw vectors every `cosine` is minus the distance.
    """

    group: Tensor  # [N]
    nearest: Tensor  # [N, k] rows, nearest first
    cosine: Tensor  # [N, k]
    right: Tensor  # [N] the nearest row of the same group
    right_cosine: Tensor  # [N]
    right_rank: Tensor  # [N] its place among all others, from 1; 0 where there is none
    other: Tensor  # [N] the nearest row of another group
    other_cosine: Tensor  # [N]
    others: Tensor  # [N] further rows of the same group

    @property
    def wrong(self) -> Tensor:
        """[N] whether a row had something to find and its nearest neighbour is of another group."""
        return (self.others > 0) & (self.right_rank != 1)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows and their cosine."""

    first: int
    second: int
    cosine: float


@dataclass(frozen=True, slots=True)
class Suspect:
    """A row whose neighbours (rows of `group`, nearest first) agree with each other and not with its label."""

    row: int
    group: int
    neighbours: tuple[int, ...]
    of: int  # neighbours looked at
    lead: float  # cosine of the nearest of them, less that of the nearest row of its own group


def search(vectors: Tensor, group: Tensor, k: int = 10, *, chunk: int = 1024, raw: bool = False) -> Search:
    """Search unit vectors [N, D] of groups [N] among each other by dot product, raw ones by euclidean distance."""
    size = len(group)
    _, inverse, members = torch.unique(group, return_inverse=True, return_counts=True)
    found: list[tuple[Tensor, ...]] = []
    left, right_side = lifted(vectors, vectors) if raw else (vectors, vectors)
    for rows in torch.split(torch.arange(size), chunk):
        scores = left[rows] @ right_side.T  # [c, N]
        scores = minus_distance(scores) if raw else scores
        scores.scatter_(1, rows[:, None], -torch.inf)
        cosine, nearest = scores.topk(max(0, min(k, size - 1)), dim=1)
        same = group[rows][:, None] == group[None, :]
        right, right_cosine = _best(scores.masked_fill(~same, -torch.inf))
        other, other_cosine = _best(scores.masked_fill(same, -torch.inf))
        rank = torch.where(right >= 0, (scores > right_cosine[:, None]).sum(1) + 1, 0)
        found.append((nearest, cosine, right, right_cosine, rank, other, other_cosine))
    nearest, cosine, right, right_cosine, rank, other, other_cosine = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Search(group, nearest, cosine, right, right_cosine, rank, other, other_cosine, members[inverse] - 1)


def mistakes(found: Search, most: int) -> list[int]:
    """Rows whose nearest neighbour is wrong, by how much nearer it is than the nearest right one; one for two groups."""
    rows = found.wrong.nonzero()[:, 0]
    lead = found.cosine[rows, 0] - found.right_cosine[rows]
    pairs = ((int(rows[i]), int(found.nearest[rows[i], 0])) for i in lead.argsort(descending=True, stable=True).tolist())
    return [first for first, _ in _once(found.group, pairs, most)]


def hardest_negatives(found: Search, most: int) -> list[Pair]:
    """The two most alike rows of different groups, then the next two groups', and so on."""
    rows = (found.other >= 0).nonzero()[:, 0]
    order = rows[found.other_cosine[rows].argsort(descending=True, stable=True)].tolist()
    pairs = ((row, int(found.other[row])) for row in order)
    return [Pair(a, b, float(found.other_cosine[a])) for a, b in _once(found.group, pairs, most)]


def suspects(found: Search, most: int, *, look: int = 5, agree: int = 3) -> list[Suspect]:
    """Rows among another group: `agree` or more of the `look` nearest are of one other group, and none of their own."""
    near = found.group[found.nearest[:, :look]]  # [N, look]
    listed: list[Suspect] = []
    for row in ((found.others > 0) & ~(near == found.group[:, None]).any(1)).nonzero()[:, 0].tolist():
        groups, counts = torch.unique(near[row], return_counts=True)
        other, votes = int(groups[counts.argmax()]), int(counts.max())
        if votes < agree:
            continue
        places = (near[row] == other).nonzero()[:, 0]
        hits = tuple(found.nearest[row, places].tolist())
        listed.append(Suspect(row, other, hits, near.shape[1], float(found.cosine[row, places[0]] - found.right_cosine[row])))
    return sorted(listed, key=lambda s: (-len(s.neighbours), -s.lead))[:most]


def sheet_queries(found: Search, most: int) -> list[int]:
    """Rows spread evenly over those that have something to find."""
    rows = (found.others > 0).nonzero()[:, 0].tolist()
    return [rows[i * len(rows) // min(most, len(rows))] for i in range(min(most, len(rows)))]


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Column and score of the best of every row; -1 and -inf where all are left out."""
    score, column = scores.max(1)
    return torch.where(score > -torch.inf, column, -1), score


def _once(group: Tensor, pairs: Iterator[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """The first pair of every two groups, in whatever direction."""
    kept: dict[frozenset[int], tuple[int, int]] = {}
    for first, second in pairs:
        kept.setdefault(frozenset((int(group[first]), int(group[second]))), (first, second))
        if len(kept) == most:
            break
    return list(kept.values())
