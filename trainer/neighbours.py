"""The nearest rows of a gallery: exact, the same at every call, and never an [N, N] matrix.

Scores are dot products, so cosines of unit vectors. They are made panel by panel; of every BLOCK scores the largest is
kept beside them, and only the k + 1 blocks with the largest maxima can hold one of the k largest scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 16  # scores that one maximum stands for
TILE = 4096  # scores of a query that are made at once on a CPU: those of 256 queries fit into its cache
PANEL = 65536  # scores of a query in memory at once, unless very many of them are asked for
ROWS, BYTES = 256, 2**28  # queries searched for at once, and what they may take; a GPU gets 16 and 8 times as much
TIED = 32  # queries whose ties are settled together


class Nearest(NamedTuple):
    """Scores [q, k], falling, and rows of the gallery [q, k]; of equal scores the lower row is first.

    Where less than k rows may be found the scores are -inf, and the rows mean nothing.
    """

    score: Tensor
    row: Tensor


@dataclass(frozen=True, slots=True)
class Hidden:
    """What queries may not find: row `own` [q] of the gallery, and all rows whose key [G] is the query's [q]."""

    own: Tensor | None = None
    key: Tensor | None = None
    gallery_key: Tensor | None = None

    def of(self, queries: Tensor) -> Hidden:
        """For some of the queries."""
        own, key = (None if t is None else t[queries] for t in (self.own, self.key))
        return Hidden(own, key, self.gallery_key)

    def hides(self, queries: Tensor, rows: Tensor) -> Tensor:
        """[n] whether query queries[i] may not find row rows[i]."""
        hidden = torch.zeros_like(rows, dtype=torch.bool)
        if self.key is not None and self.gallery_key is not None:
            hidden |= self.key[queries] == self.gallery_key[rows]
        if self.own is not None:
            hidden |= self.own[queries] == rows
        return hidden

    def hide(self, scores: Tensor, first: int) -> None:
        """Write -inf into scores [q, w] with the rows [first, first + w)."""
        end = first + scores.shape[1]
        if self.key is not None and self.gallery_key is not None:
            scores.masked_fill_(self.key[:, None] == self.gallery_key[first:end], -torch.inf)
        if self.own is not None:
            at = (self.own - first).clamp(0, scores.shape[1] - 1)[:, None]
            here = ((self.own >= first) & (self.own < end))[:, None]
            scores.scatter_(1, at, scores.gather(1, at).masked_fill(here, -torch.inf))


class Gallery:
    """Rows [G, D] to search in; keeps the memory for one panel of scores."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors
        cuda = vectors.device.type == "cuda"
        self._tile = min(PANEL if cuda else TILE, _up(max(1, len(vectors)), BLOCK))  # scores that fit into a core's cache
        self._rows, self._bytes = (16 * ROWS, 8 * BYTES) if cuda else (ROWS, BYTES)
        self._scores = vectors.new_empty(0)

    def rows(self, k: int) -> int:
        """How many queries to search for at once; depends on nothing but the gallery and k."""
        each = self._panel(k) * self.vectors.element_size() + 64 * k
        return max(1, min(self._rows, self._bytes // each))

    @torch.no_grad()
    def nearest(self, queries: Tensor, k: int, hidden: Hidden | None = None) -> Nearest:
        """The k (at most G) nearest rows of each of `queries` [q, D]; q is best at most `rows(k)`."""
        k, best = min(k, len(self.vectors)), None
        for first in range(0, len(self.vectors), self._panel(k)):
            scores, maxima = self._fill(queries, first, self._panel(k), hidden or Hidden())
            score, index = _largest(scores, maxima, k, self._tile)
            found = Nearest(score, (index + first).clamp_(max=len(self.vectors) - 1))
            best = found if best is None else _merged(best, found, k)
        assert best is not None
        return Nearest(*(t[:, :k] for t in best))

    @torch.no_grad()
    def first_rank(self, queries: Tensor, group: Tensor, gallery_group: Tensor, hidden: Hidden | None = None) -> Tensor:
        """[q] at which place the first row of the query's group comes, from 1; every query must have one to find."""
        hidden, panel = hidden or Hidden(), self._panel(1)
        starts = range(0, len(self.vectors), panel)
        best = queries.new_full((len(queries),), -torch.inf)
        at, before = torch.zeros_like(group), torch.zeros_like(group)
        for first in starts:
            scores, _ = self._fill(queries, first, panel, hidden)
            width = min(panel, len(self.vectors) - first)
            right = gallery_group[first : first + width] == group[:, None]
            score, index = scores[:, :width].masked_fill(~right, -torch.inf).max(1)  # the first of equal ones
            at = torch.where(score > best, index + first, at)
            best = torch.maximum(best, score)
        for first in starts:
            scores, _ = self._fill(queries, first, panel, hidden)
            row = torch.arange(first, first + scores.shape[1], device=scores.device)
            before += (scores > best[:, None]).sum(1) + ((scores == best[:, None]) & (row < at[:, None])).sum(1)
        return before + 1

    def _panel(self, k: int) -> int:
        return min(_up(len(self.vectors), self._tile), _up(max(PANEL, 4 * k), self._tile))

    def _fill(self, queries: Tensor, first: int, panel: int, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Scores [q, w] with the rows from `first` on, -inf behind the last one, and the blocks' maxima [q, w / BLOCK]."""
        width = min(panel, _up(len(self.vectors) - first, self._tile))
        if self._scores.numel() < len(queries) * width:
            self._scores = queries.new_empty(len(queries) * width)
        scores = self._scores[: len(queries) * width].view(len(queries), width)
        maxima = queries.new_empty(len(queries), width // BLOCK)
        step = self._tile // BLOCK
        for start in range(0, width, self._tile):
            tile = scores[:, start : start + self._tile]
            part = self.vectors[first + start : first + start + self._tile]
            torch.mm(queries, part.T, out=tile[:, : len(part)])
            tile[:, len(part) :] = -torch.inf
            hidden.hide(tile[:, : len(part)], first + start)
            blocks = tile.view(len(queries), BLOCK, step)  # block b: every step-th score from the b-th on
            torch.amax(blocks, 1, out=maxima[:, start // BLOCK : start // BLOCK + step])
        return scores, maxima


def _largest(scores: Tensor, maxima: Tensor, k: int, tile: int) -> Nearest:
    """The k largest of scores [q, w], of equal ones those on the left; as many as there are, if there are less."""
    more = min(k + 1, scores.shape[1])
    if 4 * more * BLOCK <= scores.shape[1]:
        columns = _columns(maxima.topk(more, dim=1).indices, tile)
        score, at = scores.gather(1, columns).topk(more, dim=1)
        index = columns.gather(1, at)
    else:
        score, index = scores.topk(more, dim=1)
    if more > k:  # whether the next one is as near decides which of them is taken
        tied = (score[:, k - 1] == score[:, k]) & (score[:, k] > -torch.inf)
        for rows in torch.split(tied.nonzero()[:, 0], TIED):
            index[rows, :k] = _leftmost(scores[rows], score[rows, k - 1], k)
            score[rows, :k] = scores[rows].gather(1, index[rows, :k])
    return _in_order(score[:, :k], index[:, :k])


def _columns(blocks: Tensor, tile: int) -> Tensor:
    """Where the scores of blocks [q, b] are: [q, b * BLOCK]."""
    step = tile // BLOCK
    first = blocks // step * tile + blocks % step
    return (first[:, :, None] + torch.arange(BLOCK, device=blocks.device) * step).flatten(1)


def _leftmost(scores: Tensor, least: Tensor, k: int) -> Tensor:
    """Columns [q, k] of what is above `least` [q], the k-th largest score, and of the leftmost that equal it."""
    width = scores.shape[1]
    merit = ((scores > least[:, None]).int() * 2 + (scores == least[:, None]).int()) * width
    return (merit - torch.arange(width, dtype=torch.int32, device=scores.device)).topk(k, dim=1).indices


def _in_order(score: Tensor, index: Tensor) -> Nearest:
    """By falling score and rising index."""
    if not bool((score[:, 1:] == score[:, :-1]).any()):
        return Nearest(score, index)
    index, order = index.sort(dim=1)
    score, order = torch.sort(score.gather(1, order), dim=1, descending=True, stable=True)
    return Nearest(score, index.gather(1, order))


def _merged(left: Nearest, right: Nearest, k: int) -> Nearest:
    """The k best of both; every row of `left` comes before every row of `right`."""
    score, order = torch.sort(torch.cat([left.score, right.score], 1), dim=1, descending=True, stable=True)
    return Nearest(score[:, :k], torch.cat([left.row, right.row], 1).gather(1, order[:, :k]))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
