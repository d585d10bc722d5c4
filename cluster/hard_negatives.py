"""Hard negatives from all of a data set's vectors: by exact search, a block of anchors at a time, never an [N, N] matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.hashing import Int64s, Uint64s, hash_ints
from trainer.euclidean import lifted, minus_distance
from trainer.neighbours import Gallery, Hidden

POSITIVES, PICKS = ("random", "hardest", "easiest", "all"), ("hardest", "random")
PAIRS_A_BLOCK = 4096  # (anchor, positive) whose negatives are found together
_TAG_POSITIVE, _TAG_NEGATIVE = 201, 202
Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of the `depth` nearest images of other classes become negatives. s: cosine with the anchor, of raw vectors minus
    the distance.

    The first `skip` are passed over. Then what is too near to be sure of goes: s_an > max_ratio * s_ap (NV-Retriever's
    TopK-PercPos, Moreira et al. 2024, section 3), s_an > max_score, s_an > s_ap - margin. Of the rest `negatives` are taken:
    the nearest, or random ones.
    """

    negatives: int = 1
    skip: int = 0
    depth: int = 50
    pick: str = "hardest"
    max_ratio: float | None = None
    max_score: float | None = None
    margin: float | None = None
    seed: int = 0


class Images(NamedTuple):
    """n images: vectors [n, dim], numbers of their groups [n], and uids [n] (equal bytes have equal ones).

    Vectors are of unit length unless they are `raw`.
    """

    vectors: Tensor
    group: Int64s
    uid: Int64s
    raw: bool = False


class Triplets(NamedTuple):
    """T triplets of image numbers: anchor and positive [T], negatives [T, N], -1 where there are fewer.

    s_ap [T] and s_an [T, N] are similarities as in Choice; s_an is nan where there is no negative.
    """

    anchor: Int64s
    positive: Int64s
    negatives: Int64s
    s_ap: Scores
    s_an: Scores


def positives_of_class(images: Images, how: str, count: int, seed: int) -> tuple[Int64s, Int64s]:
    """(anchor, positive) of one group: for each image `count` (all: every) others of its group that have other bytes.  [P] each

    `how` one of POSITIVES; hardest is the farthest. Sorted by anchor; images that are alone in their group have none.
    """
    anchors, positives = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    order = np.argsort(images.group, kind="stable")
    cuts = np.flatnonzero(np.diff(images.group[order])) + 1
    for members in np.split(order, cuts):
        for start in range(0, len(members), 256):
            some = members[start : start + 256]
            allowed = images.uid[some, None] != images.uid[None, members]
            merit = _merit(images, some, members, how, seed)
            chosen = np.argsort(np.where(allowed, merit, np.inf), axis=1, kind="stable")
            chosen = chosen if how == "all" else chosen[:, :count]
            there = np.take_along_axis(allowed, chosen, 1)
            anchors.append(np.repeat(some, there.sum(1)))
            positives.append(members[chosen[there]])
    anchor, positive = np.concatenate(anchors), np.concatenate(positives)
    by_anchor = np.argsort(anchor, kind="stable")
    return anchor[by_anchor], positive[by_anchor]


def find_negatives(
    images: Images,
    anchor: Int64s,
    positive: Int64s,
    candidates: Int64s,
    choice: Choice,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Triplets:
    """A triplet for each (anchor, positive) that has a negative among `candidates` [c] after all filters.

    A candidate is of another group than the anchor, and its bytes are in no image of the anchor's group. Equal scores go to
    the first candidate. What comes out does not depend on the block.
    """
    _, first = np.unique(images.uid[candidates], return_index=True)
    candidates = candidates[np.sort(first)]  # each image once
    search = _Search(images, candidates, choice)
    parts = [_none(choice.negatives)]
    for start in range(0, len(anchor), PAIRS_A_BLOCK):
        block = slice(start, start + PAIRS_A_BLOCK)
        parts.append(search(anchor[block], positive[block]))
        progress(min(start + PAIRS_A_BLOCK, len(anchor)), len(anchor))
    return Triplets(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class _Search:
    """Holds the gallery."""

    def __init__(self, images: Images, candidates: Int64s, choice: Choice) -> None:
        self._images, self._candidates, self._choice = images, candidates, choice
        queries, gallery = images.vectors, images.vectors[torch.from_numpy(candidates)]
        if images.raw:
            queries, gallery = lifted(queries, gallery)
        self._queries, self._gallery = queries, Gallery(gallery)
        self._group = torch.from_numpy(images.group[candidates])
        self._codes = np.unique(images.uid, return_inverse=True)[1].astype(np.int64)  # [n]
        self._groups = int(images.group.max()) + 1
        self._known = np.unique(self._codes * self._groups + images.group)  # which bytes are in which group

    def __call__(self, anchor: Int64s, positive: Int64s) -> Triplets:
        images, choice = self._images, self._choice
        unique, place = np.unique(anchor, return_inverse=True)
        rows, scores = self._nearest(unique)
        rows, s_an = rows[place], scores[place]  # [p, depth]
        a, p = images.vectors[anchor], images.vectors[positive]
        s_ap = (-(a.double() - p.double()).norm(dim=1).float() if images.raw else (a * p).sum(1)).numpy()
        good = (s_an > -np.inf) & ~self._in_group(rows, images.group[anchor])
        good[:, : choice.skip] = False
        for most in (
            None if choice.max_ratio is None else choice.max_ratio * s_ap,
            None if choice.max_score is None else np.full_like(s_ap, choice.max_score),
            None if choice.margin is None else s_ap - choice.margin,
        ):
            if most is not None:
                good &= s_an <= most[:, None]
        merit = np.broadcast_to(np.arange(rows.shape[1], dtype=np.float64), rows.shape)
        if choice.pick == "random":
            merit = _draws(hash_ints(choice.seed, _TAG_NEGATIVE, anchor[:, None], positive[:, None], rows))
        chosen = np.argsort(np.where(good, merit, np.inf), axis=1, kind="stable")[:, : choice.negatives]
        there = np.take_along_axis(good, chosen, 1)
        negatives = np.where(there, np.take_along_axis(rows, chosen, 1), -1)
        found = np.where(there, np.take_along_axis(s_an, chosen, 1), np.float32(np.nan))
        if choice.negatives > negatives.shape[1]:  # there are fewer candidates in all
            more = ((0, 0), (0, choice.negatives - negatives.shape[1]))
            negatives, found = np.pad(negatives, more, constant_values=-1), np.pad(found, more, constant_values=np.nan)
        kept = there.any(1)
        return Triplets(anchor[kept], positive[kept], negatives[kept], s_ap[kept], found[kept])

    def _nearest(self, anchor: Int64s) -> tuple[Int64s, Scores]:
        """Of each anchor the `depth` nearest candidates of other groups, image numbers and scores; -inf: there are fewer."""
        rows, scores = [], []
        queries = torch.from_numpy(anchor)
        for some in torch.split(queries, self._gallery.rows(self._choice.depth)):
            hidden = Hidden(key=torch.from_numpy(self._images.group)[some], gallery_key=self._group)
            found = self._gallery.nearest(self._queries[some], self._choice.depth, hidden)
            rows.append(self._candidates[found.row.numpy()])
            scores.append((minus_distance(found.score).float() if self._images.raw else found.score).numpy())
        return np.concatenate(rows), np.concatenate(scores)

    def _in_group(self, rows: Int64s, group: Int64s) -> NDArray[np.bool_]:
        """Whether the bytes of images `rows` [p, k] are also those of an image of `group` [p]."""
        wanted = self._codes[rows] * self._groups + group[:, None]
        at = np.minimum(np.searchsorted(self._known, wanted), len(self._known) - 1)
        return np.asarray(self._known[at] == wanted)


def _merit(images: Images, some: Int64s, members: Int64s, how: str, seed: int) -> NDArray[np.float64]:
    """The lowest is chosen first.  [len(some), len(members)]"""
    if how == "all":
        return np.broadcast_to(np.arange(len(members), dtype=np.float64), (len(some), len(members)))
    if how == "random":
        return _draws(hash_ints(seed, _TAG_POSITIVE, some[:, None], members[None, :]))
    a, b = images.vectors[some].double(), images.vectors[members].double()
    scores = (-torch.cdist(a, b) if images.raw else a @ b.T).numpy()
    return np.asarray(scores if how == "hardest" else -scores)


def _draws(keys: Uint64s) -> NDArray[np.float64]:
    return (keys >> np.uint64(11)).astype(np.float64)


def _none(negatives: int) -> Triplets:
    empty, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    return Triplets(empty, empty, np.empty((0, negatives), np.int64), scores, np.empty((0, negatives), np.float32))
