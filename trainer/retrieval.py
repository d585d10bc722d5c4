"""Retrieval metrics of every query, from its exact neighbours; shared out over ranks, the same on any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from configs.evaluation import recall_depth
from trainer import collectives
from trainer.neighbours import Gallery
from trainer.protocol import Protocol


def per_query(protocol: Protocol, names: Sequence[str], beat: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """float64 [Q] for each metric, 0 for queries that have nothing to find. Collective: every rank calls it.

    recall_at_K: whether one of the K nearest is right; precision_at_1 is recall_at_1. With R right ones in the gallery,
    r_precision is their share of the R nearest, and map_at_r the mean over the R nearest of the precision at i where the
    i-th is right, else 0 (Musgrave et al. 2020). mrr: 1 / (place of the first right one). Of equally near ones the one that
    comes first in the gallery counts as nearer. `beat` is called for every block of queries.
    """
    found = torch.zeros((len(names), len(protocol.group)), dtype=torch.float64, device=protocol.group.device)
    gallery, hidden, relevant = Gallery(protocol.gallery), protocol.hidden, protocol.relevant()
    for rows, depth in _share(gallery, names, relevant):
        near = gallery.nearest(protocol.vectors[rows], depth, hidden.of(rows))
        right = (protocol.gallery_group[near.row] == protocol.group[rows, None]) & (near.score > -torch.inf)
        for number, name in enumerate(names):
            found[number, rows] = _score(name, right, relevant[rows])
        late = rows[~right.any(1)]
        if "mrr" in names and len(late):
            place = gallery.first_rank(protocol.vectors[late], protocol.group[late], protocol.gallery_group, hidden.of(late))
            found[names.index("mrr"), late] = 1 / place.clamp(min=depth + 1).double()
        beat()
    return dict(zip(names, collectives.total(found), strict=True))


def _share(gallery: Gallery, names: Sequence[str], relevant: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Blocks of the queries of this rank that have something to find, with how many neighbours they need.

    Those that need as many are together. The blocks are the same on any number of ranks: the shape of a product of
    matrices may decide its last bits.
    """
    least = max([1, *(recall_depth(name) or 1 for name in names)])
    depth = relevant.clamp(min=least) if {"r_precision", "map_at_r"} & set(names) else torch.full_like(relevant, least)
    order = depth.argsort(stable=True)
    order = order[relevant[order] > 0]
    depths, start, number = depth[order].tolist(), 0, 0
    while start < len(order):
        end = start + gallery.rows(depths[start])
        end = start + min(end - start, gallery.rows(depths[min(end, len(order)) - 1]))
        if number % collectives.world() == collectives.rank():
            yield order[start:end], depths[min(end, len(order)) - 1]
        start, number = end, number + 1


def _score(name: str, right: Tensor, relevant: Tensor) -> Tensor:
    """[q] of right [q, K], whether the i-th nearest is right, and relevant [q], how many there are."""
    k = 1 if name == "precision_at_1" else recall_depth(name)
    if k is not None:
        return right[:, :k].any(1).double()
    place = torch.arange(1, right.shape[1] + 1, device=right.device, dtype=torch.float64)
    if name == "mrr":
        return (right / place).amax(1)
    within = right & (place <= relevant[:, None])
    if name == "r_precision":
        return within.sum(1) / relevant.double()
    return (within.cumsum(1) / place * within).sum(1) / relevant
