"""What the embeddings of an evaluation set show, as pictures with words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.report.confusion import Cluster, clusters, named
from trainer.report.plane import Plane, choose, lay_out
from trainer.report.search import Search, hardest_negatives, mistakes, search, sheet_queries, suspects
from trainer.report.spread import Spread, spread

SHEETS, NEIGHBOURS = 12, 5
NAMED = 20  # classes of a scatter plot, at most
MISTAKES, CLUSTERS, MEMBERS, NEGATIVES, SUSPECTS, GIVEN = 12, 8, 12, 12, 8, 8


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image with its class; None for a member that is a vector."""

    image: bytes | None
    label: str


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One hit of a search, its cosine to the query (of raw vectors the distance), and whether its class is the query's."""

    picture: Picture
    cosine: float
    right: bool


@dataclass(frozen=True, slots=True)
class Sheet:
    """A query and its nearest neighbours, nearest first. `right`: the nearest right one, where it is not among them."""

    query: Picture
    neighbours: Sequence[Neighbour]
    right: Neighbour | None = None
    right_rank: int = 0


@dataclass(frozen=True, slots=True)
class Confused:
    """Classes that are taken for one another: a title, some of the members, and the two that are most."""

    title: str
    members: Sequence[Picture]
    num_classes: int
    searches: int
    missed: int
    pairs: Sequence[tuple[str, str, int]]


@dataclass(frozen=True, slots=True)
class Alike:
    """Two pictures and their cosine, of raw vectors the distance."""

    first: Picture
    second: Picture
    cosine: float


@dataclass(frozen=True, slots=True)
class Doubt:
    """A picture whose neighbours are all called something else."""

    picture: Picture
    neighbours: Sequence[Picture]
    called: str
    of: int


@dataclass(frozen=True, slots=True)
class Map:
    """Two planes of the same rows, before and after training; `groups` of rows are shown as `pictures`."""

    before: Plane | None
    after: Plane
    groups: Sequence[Sequence[int]]
    pictures: dict[int, Picture]


@dataclass(frozen=True, slots=True)
class Flat:
    """Raw vectors [N, 2] of the same rows before and after training, with groups [N] and what the groups are called."""

    before: Tensor | None
    after: Tensor
    group: Tensor
    names: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Insight:
    """Every part may be empty. `most_others`: how many right neighbours the largest class lets an image have."""

    sheets: Sequence[Sheet]
    mistakes: Sequence[Sheet]
    num_mistakes: int
    clusters: Sequence[Confused]
    negatives: Sequence[Alike]
    doubts: Sequence[Doubt]
    unlike: Sequence[Alike]  # pairs that were given as positive, the least alike first
    alike: Sequence[Alike]  # pairs that were given as negative, the most alike first
    before: Spread | None
    after: Spread
    map: Map | None
    most_others: int
    num_queries: int
    raw: bool = False  # vectors are compared by euclidean distance
    flat: Flat | None = None  # in place of a map, where raw vectors have two numbers


class Shown(Protocol):
    """The evaluation set of N rows."""

    @property
    def group(self) -> Tensor:
        """[N]"""

    @property
    def shown(self) -> Tensor:
        """[N] bool, whether a row is an image."""

    def picture(self, row: int) -> Picture: ...

    def name_of(self, group: int) -> str: ...

    def given(self) -> tuple[Tensor, Tensor]:
        """Pairs of rows [p, 2], [n, 2] that records give as positive and as negative; of labelled images none."""


def look(shown: Shown, after: Tensor, before: Tensor | None = None, *, raw: bool = False) -> Insight | None:
    """Analyse vectors [N, D] of the trained and of the untrained encoder, by cosine, or by euclidean distance where they are
    raw; None where there are not two rows.
    """
    if len(after) < 2:
        return None
    group = shown.group
    found = search(after, group, raw=raw)
    flat = _flat(shown, after, before) if raw and after.shape[1] == 2 else None
    wrong = mistakes(found, MISTAKES)
    positive, negative = shown.given()
    return Insight(
        sheets=[_sheet(shown, found, row, raw=raw) for row in sheet_queries(found, SHEETS)],
        mistakes=[_sheet(shown, found, row, raw=raw) for row in wrong],
        num_mistakes=int(found.wrong.sum()),
        clusters=[_confused(shown, found, cluster) for cluster in clusters(found, CLUSTERS)],
        negatives=[
            _alike(shown, p.first, p.second, -p.cosine if raw else p.cosine) for p in hardest_negatives(found, NEGATIVES)
        ],
        doubts=[
            Doubt(shown.picture(s.row), [shown.picture(i) for i in s.neighbours], shown.name_of(s.group), s.of)
            for s in suspects(found, SUSPECTS)
        ],
        unlike=_extreme(shown, after, positive, least=True, raw=raw),
        alike=_extreme(shown, after, negative, least=False, raw=raw),
        before=None if before is None else spread(before, group, raw=raw),
        after=spread(after, group, raw=raw),
        map=None if flat is not None else _map(shown, after, before),
        most_others=int(found.others.max()),
        num_queries=int((found.others > 0).sum()),
        raw=raw,
        flat=flat,
    )


def _sheet(shown: Shown, found: Search, row: int, *, raw: bool) -> Sheet:
    sign = -1 if raw else 1
    hits = found.nearest[row, :NEIGHBOURS].tolist()
    same = found.group[hits] == found.group[row]
    neighbours = [
        Neighbour(shown.picture(hit), sign * score, right)
        for hit, score, right in zip(hits, found.cosine[row].tolist(), same.tolist(), strict=False)
    ]
    rank = int(found.right_rank[row])
    right = Neighbour(shown.picture(int(found.right[row])), sign * float(found.right_cosine[row]), True) if rank else None
    return Sheet(shown.picture(row), neighbours, right, rank)


def _confused(shown: Shown, found: Search, cluster: Cluster) -> Confused:
    """With one picture of each of the first members, as much of one kind as there is."""
    rows = {g: (found.group == g) & shown.shown for g in cluster.groups}
    members = [shown.picture(int(here.nonzero()[0, 0])) for here in rows.values() if here.any()][:MEMBERS]
    pairs = [(shown.name_of(a), shown.name_of(b), n) for a, b, n in cluster.pairs]
    title = named(cluster, shown.name_of)
    return Confused(title, members, len(cluster.groups), cluster.searches, cluster.missed, pairs)


def _alike(shown: Shown, first: int, second: int, cosine: float) -> Alike:
    return Alike(shown.picture(first), shown.picture(second), cosine)


def _extreme(shown: Shown, vectors: Tensor, pairs: Tensor, *, least: bool, raw: bool) -> list[Alike]:
    first, second = vectors[pairs[:, 0]], vectors[pairs[:, 1]]
    cosine = -(first - second).norm(dim=1) if raw else (first * second).sum(1)
    order = cosine.argsort(descending=not least, stable=True)[:GIVEN].tolist()
    return [_alike(shown, int(pairs[i, 0]), int(pairs[i, 1]), float(cosine[i].abs() if raw else cosine[i])) for i in order]


def _flat(shown: Shown, after: Tensor, before: Tensor | None) -> Flat:
    groups = torch.unique(shown.group).tolist()
    names = {group: shown.name_of(group) for group in groups} if len(groups) <= NAMED else {}
    return Flat(before, after, shown.group, names)


def _map(shown: Shown, after: Tensor, before: Tensor | None) -> Map | None:
    plane = lay_out(after)
    groups = choose(plane.points, shown.group, shown.shown)
    pictures = {row: shown.picture(row) for rows in groups for row in rows}
    return Map(None if before is None else lay_out(before), plane, groups, pictures) if groups else None
