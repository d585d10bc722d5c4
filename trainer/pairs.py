"""Scores of pairs that show the same thing and of pairs that do not: cosines, or minus distances where vectors are raw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.protocol import Protocol

LIMIT = 10_000_000  # pairs: up to so many all are looked at, beyond it a sample
SAMPLE = LIMIT // 2  # of the pairs of either sort
AT_ONCE = 2**21  # numbers of pairs in memory
Pick = Callable[[Tensor], tuple[Tensor, Tensor]]  # numbers [n] -> queries [n], rows of the gallery [n]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Scores of pairs of the same class [S] and of different classes [N], and how many of either there are in all."""

    same: Tensor
    different: Tensor
    num_same: int
    num_different: int

    @property
    def sampled(self) -> bool:
        return len(self.same) < self.num_same or len(self.different) < self.num_different


def every_pair(protocol: Protocol, *, limit: int = LIMIT, sample: int = SAMPLE, seed: int = 0) -> Pairs:
    """All pairs of a query and a row that it may find, each once; a random sample of either sort when there are more than
    `limit`, drawn with replacement from `seed` where there are more than `sample` of that sort.
    """
    twice = 2 if protocol.same else 1  # each pair is met from both sides
    num_same = int(protocol.relevant().sum()) // twice
    num_pairs = int(protocol.searched().sum()) // twice
    if num_pairs <= limit:
        return _all(protocol)
    generator = torch.Generator().manual_seed(seed)
    same = _some(protocol, num_same, sample, generator, same=True)
    different = _some(protocol, num_pairs - num_same, sample, generator, same=False)
    return Pairs(same, different, num_same, num_pairs - num_same)


def given_pairs(score: Tensor, match: Tensor) -> Pairs:
    """Pairs that a person has judged: score [P], match [P] 1 or 0."""
    same, different = score[match == 1], score[match == 0]
    return Pairs(same, different, len(same), len(different))


def _all(protocol: Protocol) -> Pairs:
    same, different, hidden = [], [], protocol.hidden
    size = len(protocol.gallery)
    for rows in torch.split(torch.arange(len(protocol.group), device=protocol.group.device), max(1, 2**22 // size)):
        scores = protocol.vectors[rows] @ protocol.gallery.T
        hidden.of(rows).hide(scores, 0)
        allowed = scores > -torch.inf
        if protocol.same:
            allowed &= torch.arange(size, device=rows.device) > rows[:, None]
        right = protocol.group[rows, None] == protocol.gallery_group
        same.append(scores[allowed & right])
        different.append(scores[allowed & ~right])
    found = torch.cat(same), torch.cat(different)
    return Pairs(*found, *map(len, found))


def _some(protocol: Protocol, number: int, sample: int, generator: torch.Generator, *, same: bool) -> Tensor:
    """Cosines of all `number` pairs of a sort, or of `sample` of them."""
    total, pick = _members(protocol) if same else _anything(protocol)
    whole, found, count = number <= sample, [], 0
    for numbers in _counted(total) if whole else _random(total, min(AT_ONCE, 4 * sample), generator):
        query, row = pick(numbers.to(protocol.group.device))
        keep = (protocol.group[query] == protocol.gallery_group[row]) == same
        keep &= ~protocol.hidden.hides(query, row)
        if whole and protocol.same:
            keep &= row > query
        query, row = query[keep], row[keep]
        for part in torch.split(torch.arange(len(query)), 2**16):
            found.append((protocol.vectors[query[part]] * protocol.gallery[row[part]]).sum(1))
        count += len(query)
        if not whole and count >= sample:
            break
    return torch.cat(found)[: number if whole else sample]


def _members(protocol: Protocol) -> tuple[int, Pick]:
    """For every query, one after the other, every row of its class."""
    order = protocol.gallery_group.argsort(stable=True)
    by_class = protocol.gallery_group[order]
    first = torch.searchsorted(by_class, protocol.group)
    count = torch.searchsorted(by_class, protocol.group, right=True) - first
    ends = count.cumsum(0)

    def pick(numbers: Tensor) -> tuple[Tensor, Tensor]:
        query = torch.searchsorted(ends, numbers, right=True)
        return query, order[first[query] + numbers - (ends - count)[query]]

    return int(ends[-1]), pick


def _anything(protocol: Protocol) -> tuple[int, Pick]:
    size = len(protocol.gallery)
    return len(protocol.group) * size, lambda numbers: (numbers // size, numbers % size)


def _counted(total: int) -> Iterator[Tensor]:
    for start in range(0, total, AT_ONCE):
        yield torch.arange(start, min(start + AT_ONCE, total))


def _random(total: int, at_once: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield torch.randint(total, (at_once,), generator=generator)
