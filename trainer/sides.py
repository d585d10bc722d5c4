"""Searching across the two sides of records: anchors among what goes with them, or positives among anchors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trainer.evaluate import Embedded


def sides(found: Embedded, among: Embedded | None, queries: str) -> tuple[Embedded, Embedded, Tensor | None]:
    """Queries, gallery, and the row of the gallery that is the query itself, [Q], -1 for none.

    queries: `anchors`, then view 0 is searched among the views from 1 on, or `positives`, then view 1 among view 0; of
    `among`, or of `found` itself. In the gallery a member (`uid`) of a group is kept once, the first of them.
    """
    gallery = found if among is None else among
    view, gallery_view = found.sample[:, 2], gallery.sample[:, 2]
    asked = view == 0 if queries == "anchors" else view == 1
    there = gallery_view >= 1 if queries == "anchors" else gallery_view == 0
    few, rest = select(found, asked.nonzero()[:, 0]), select(gallery, there.nonzero()[:, 0])
    if rest.uid is None:
        return few, rest, None
    rest = select(rest, _first_of_each(_names(rest)))
    return few, rest, _own(few, rest) if among is None else None


def select(found: Embedded, rows: Tensor) -> Embedded:
    """Some of the rows."""
    uid, match = (None if t is None else t[rows] for t in (found.uid, found.match))
    return replace(found, vectors=found.vectors[rows], group=found.group[rows], sample=found.sample[rows], uid=uid, match=match)


def _names(found: Embedded) -> Tensor:
    assert found.uid is not None
    return torch.stack([found.group, found.uid], dim=1)  # [N, 2]


def _first_of_each(names: Tensor) -> Tensor:
    """Rows at which a name [N, 2] comes for the first time, in order."""
    distinct, number = torch.unique(names, dim=0, return_inverse=True)
    rows = torch.arange(len(names), device=names.device)
    first = rows.new_full((len(distinct),), len(names)).scatter_reduce(0, number, rows, "amin")
    return first.sort().values


def _own(queries: Embedded, gallery: Embedded) -> Tensor:
    names = torch.cat([_names(gallery), _names(queries)])
    distinct, number = torch.unique(names, dim=0, return_inverse=True)
    at: Tensor = number.new_full((len(distinct),), -1)
    size = len(gallery.group)
    at[number[:size]] = torch.arange(size, device=at.device)
    return at.index_select(0, number[size:])
