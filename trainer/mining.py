"""Choosing which pairs count: columns of a chunk's rows, found without gradient.

Candidates come sorted by uid and the first of equal values along a row is picked, so ties go to the lowest uid.
`nearness` falls as the distance grows (see Rows.nearness). Passes over [q, G] stay in floats: on a CPU a mask of bools and
a masked fill cost 5 to 15 times a subtraction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distance import Distance
from trainer.random_keys import uniform
from trainer.rows import Rows

NEAREST, FARTHEST = 0.5, 1.4  # cut-offs of distance-weighted sampling
LARGEST_SUM = 2**52  # integers up to here are whole in float64 too


def pack_(rows: Rows) -> None:
    """Put the positives of each query before the padding, and drop columns that are padding for all: less to loop over.

    Waits for the device once.
    """
    width = max(1, int(rows.is_positive.sum(1).max())) if len(rows.is_positive) else 1
    if width < rows.positives.shape[1]:
        order = (~rows.is_positive).byte().argsort(dim=1, stable=True)[:, :width]
        rows.positives, rows.is_positive = rows.positives.gather(1, order), rows.is_positive.gather(1, order)


def hardest_positive(rows: Rows, kind: Distance) -> tuple[Tensor, Tensor]:
    """The farthest positive of each query: columns [q, 1], and whether there is any [q, 1]."""
    nearness = rows.nearness(kind, rows.positives).masked_fill(~rows.is_positive, torch.inf)
    place = nearness.min(1, keepdim=True).indices
    return rows.positives.gather(1, place), rows.is_positive.any(1, keepdim=True)


def hardest_negative(rows: Rows, kind: Distance) -> tuple[Tensor, Tensor]:
    """The closest negative of each query: columns [q, 1], and whether there is any [q, 1]."""
    nearness, columns = negatives(rows, kind).max(1, keepdim=True)
    return columns, nearness > -torch.inf


def negatives(rows: Rows, kind: Distance) -> Tensor:
    """Nearness of the negatives, -inf elsewhere.  [q, G], its own memory"""
    nearness = rows.nearness(kind)
    return rows.bar_(nearness.clone() if nearness is rows.similarity else nearness, -torch.inf)


def distances(rows: Rows, kind: Distance, columns: Tensor | None = None) -> Tensor:
    """Distances to the negatives, inf elsewhere [q, G]; at `columns` [q, k] to whatever is there. Its own memory."""
    similarity = rows.similarity if columns is None else rows.similarity.gather(1, columns)
    if kind == "cosine":
        found = 1 - similarity
    else:
        norms = rows.candidate_norms.detach()
        found = torch.add(norms[None, :] if columns is None else norms[columns], similarity, alpha=-2)
        found.add_(rows.query_norms.detach()[:, None]).clamp_(min=0)
        if kind == "euclidean":
            found.sqrt_()
    return found if columns is not None else rows.bar_(found, torch.inf)


def num_finite(far: Tensor) -> Tensor:
    """How many of the distances [q, G] are not inf.  [q]"""
    return (torch.finfo(far.dtype).max - far).clamp_(0, 1).sum(1)


def semi_hard(rows: Rows, kind: Distance) -> tuple[Tensor, Tensor]:
    """For every (query, positive) the closest negative strictly farther than the positive, else the farthest negative.

    No upper bound. Returns columns and whether the pair and a negative exist, [q, P] each.
    Source: TensorFlow Addons' triplet_semihard_loss.
    """
    nearness = negatives(rows, kind)  # [q, G]
    excess, columns = _closest_beyond(nearness, rows.nearness(kind, rows.positives))
    farthest, fallback = rows.bar_(nearness, torch.inf).min(1, keepdim=True)
    return torch.where(excess < torch.inf, columns, fallback), rows.is_positive & (farthest < torch.inf)


def semi_hard_within_margin(rows: Rows, kind: Distance, margin: float, *, random: bool) -> tuple[Tensor, Tensor]:
    """For every (query, positive) a negative with d_ap < d_an < d_ap + margin: the closest, or a random one.

    Returns columns and whether there is one, [q, P] each. Source: Schroff et al. 2015, section 3.2.
    """
    far, near = distances(rows, kind), distances(rows, kind, rows.positives)
    if not random:
        _, columns = _closest_beyond(far.neg_(), -near)
        found = far.gather(1, columns).neg_()
        return columns, rows.is_positive & (found > near) & (found < near + margin)
    columns, exists = torch.empty_like(rows.positives), torch.empty_like(rows.is_positive)
    draws = uniform_of_pairs(rows)
    for j in range(columns.shape[1]):
        d_ap = near[:, j : j + 1]
        columns[:, j], exists[:, j] = draw((far > d_ap).logical_and_(far < d_ap + margin).to(far.dtype), draws[:, j])
    return columns, rows.is_positive & exists


def random_hard(rows: Rows, kind: Distance, margin: float) -> tuple[Tensor, Tensor]:
    """For every (query, positive) a random negative with d_an < d_ap + margin: columns, and whether there is one, [q, P]."""
    far, near = distances(rows, kind), distances(rows, kind, rows.positives)
    columns, exists = torch.empty_like(rows.positives), torch.empty_like(rows.is_positive)
    draws = uniform_of_pairs(rows)
    for j in range(columns.shape[1]):
        violates = (near[:, j : j + 1] + margin - far).clamp_(min=0).sign_()  # [q, G] 1 or 0
        columns[:, j], exists[:, j] = draw(violates, draws[:, j])
    return columns, rows.is_positive & exists


def distance_weighted(rows: Rows) -> tuple[Tensor, Tensor]:
    """For every (query, positive) a negative drawn with weight d^(2-D) (1 - d^2/4)^((3-D)/2), d euclidean, D = rows.dim.

    That is the inverse of how often a distance occurs between random unit vectors. d is cut off at 0.5 from below; beyond
    1.4 nothing is drawn, unless a query has no closer negative: then all weigh the same. Returns columns and whether there
    is one, [q, P] each. Source: Wu et al. 2017, section 4, and its sampler.
    """
    squared = distances(rows, "squared_euclidean")
    within = (FARTHEST**2 - squared).clamp_(min=0).sign_()  # [q, G] 1 or 0
    squared.clamp_(NEAREST**2, FARTHEST**2)
    log_weight = squared.log().mul_((2 - rows.dim) / 2).add_(squared.mul_(-0.25).add_(1).log_(), alpha=(3 - rows.dim) / 2)
    weight = log_weight.sub_(log_weight.amax(1, keepdim=True)).exp_().mul_(within)
    weight.add_(rows.bar_(torch.ones_like(weight), 0.0).mul_(within.amax(1, keepdim=True) == 0))
    columns, exists = draw(weight, uniform_of_pairs(rows))
    return columns, rows.is_positive & exists


def draw(weight: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `chance` in [0, 1), [q] or [q, k], a column of its row with probability by `weight` [q, G] >= 0.

    Returns columns, and whether the row has any weight. The columns' order is that of uids, so no rank number enters.
    """
    rest = 1 - (chance if chance.dim() == 2 else chance[:, None])  # in (0, 1]
    if weight.device.type == "cpu":
        below = weight.cumsum(1)  # [q, G]
        wanted = below[:, -1:] * rest.to(weight.dtype)  # in (0, total]
    else:
        below = _whole_sums(weight)
        wanted = (below[:, -1:] * rest).ceil().long()
    total = below[:, -1:]
    columns = torch.searchsorted(below, wanted).clamp_max(weight.shape[1] - 1)  # never one of weight 0
    exists = (total > 0).expand_as(columns)
    return (columns, exists) if chance.dim() == 2 else (columns[:, 0], exists[:, 0])


def _whole_sums(weight: Tensor) -> Tensor:
    """Sums along rows of `weight` [q, G], in integers.

    GPUs add floats in no fixed order: their sums can fall from one column to the next, and where weights are 0 they can rise.
    """
    most = weight.amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / most).mul_(LARGEST_SUM // weight.shape[1]).long().cumsum_(1)


def uniform_of_pairs(rows: Rows) -> Tensor:
    """A random number in [0, 1) for every (query, positive), from the step's seed and both uids and views.  [q, P] float64"""
    q, c = rows.queries, rows.candidates
    return uniform(rows.seed, q.uid[:, None], q.view[:, None], c.uid[rows.positives], c.view[rows.positives])


def counted_here(rows: Rows, columns: Tensor) -> Tensor:
    """Which pairs (query, candidate) a loss over unordered pairs counts at this query.  [q, k] bool at `columns`

    A pair whose two rows are both queries is met twice; it counts at the row of the lower view, then of the lower uid.
    """
    rank, own = _ranks(rows)
    return rank[columns] > own[:, None]


def bar_elsewhere_(rows: Rows, far: Tensor) -> Tensor:
    """Overwrite distances [q, G] by inf where `counted_here` is false."""
    rank, own = _ranks(rows)
    behind = torch.sub(rank.to(far.dtype)[None, :], own.to(far.dtype)[:, None])  # exact in fp32 up to four million candidates
    return far.sub_(torch.threshold_(behind, 0.0, -torch.inf).clamp_(max=0))


def _ranks(rows: Rows) -> tuple[Tensor, Tensor]:
    """Candidates [G] and queries [q] numbered by view, then by uid; what memory holds comes last and asks no questions."""
    view, record = rows.candidates.view, rows.candidates.record
    width = len(view)
    rank = view.clamp_max(2) * width + torch.arange(width, device=view.device)
    return rank.masked_fill(record < 0, 3 * width), rows.queries.view * width + rows.place


def _closest_beyond(nearness: Tensor, than: Tensor) -> tuple[Tensor, Tensor]:
    """For every `than` [q, P] the column of the highest nearness [q, G] below it: by how much (inf: none), and columns."""
    excess, columns = torch.empty_like(than), torch.empty(than.shape, dtype=torch.int64, device=than.device)
    work = torch.empty_like(nearness)
    for j in range(than.shape[1]):
        torch.sub(than[:, j : j + 1], nearness, out=work)
        torch.min(torch.threshold_(work, 0.0, torch.inf), 1, out=(excess[:, j], columns[:, j]))
    return excess, columns
