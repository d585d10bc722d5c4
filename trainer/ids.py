"""The integers that travel with the rows of a batch, and what they say about pairs of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer import collectives


@dataclass(frozen=True, slots=True)
class Ids:
    """[n] int64 each; see pipelines/batch.py. `record` is global here, `match` is given per row."""

    group: Tensor
    uid: Tensor
    view: Tensor
    record: Tensor
    match: Tensor  # 1, or 0 for the rows of a labelled pair that does not match
    valid: Tensor  # 1 or 0

    def stack(self) -> Tensor:
        return torch.stack([self.group, self.uid, self.view, self.record, self.match, self.valid], dim=1)  # [n, 6]

    @staticmethod
    def unstack(columns: Tensor) -> Ids:
        return Ids(*columns.unbind(1))

    def select(self, rows: Tensor) -> Ids:
        return Ids.unstack(self.stack()[rows])

    def order(self) -> Tensor:
        """Rows sorted by (uid, view, record): an order in which no rank number enters."""
        order = torch.arange(len(self.uid), device=self.uid.device)
        for key in (self.record, self.view, self.uid):  # the last sort counts most
            order = order[key[order].argsort(stable=True)]
        return order


@dataclass(frozen=True, slots=True)
class Related:
    """What q queries share with the candidates. Padding repeats a column and says nothing new about it."""

    columns: Tensor  # [q, P] candidates of the query's own group
    is_positive: Tensor  # [q, P] bool
    _negative: Tensor  # [q, P] bool, of the own group and a negative all the same
    _same_image: Tensor  # [q, U] candidates that are the query's own image
    _has_image: Tensor  # [q, 1] bool, whether there is any
    _row_mask: Tensor | None  # [q, 1] bool, queries for which `_column_mask` matters; None: no such columns
    _column_mask: Tensor | None  # [G] bool, explicit negatives, which only anchors see
    _valid: Tensor | None  # [G] bool; None: all are

    def select(self, rows: slice) -> Related:
        """The same for some of the queries."""
        own = {name: getattr(self, name)[rows] for name in ("columns", "is_positive", "_negative", "_same_image", "_has_image")}
        return replace(self, **own, _row_mask=None if self._row_mask is None else self._row_mask[rows])

    def bar_(self, matrix: Tensor, value: float) -> Tensor:
        """Overwrite [q, G] by `value` where the candidate is no negative of the query: a few columns, not all pairs."""
        _fill(matrix, self.columns, ~self._negative, value)
        _fill(matrix, self._same_image, self._has_image, value)
        if self._valid is not None:
            matrix.masked_fill_(~self._valid[None, :], value)
        if self._row_mask is not None and self._column_mask is not None:
            matrix.masked_fill_(self._row_mask & self._column_mask[None, :], value)
        return matrix

    def num_negatives(self, num_candidates: int) -> Tensor | None:
        """How many negatives each query has, counted from what it shares; None where counting `bar_` is cheaper.  [q]"""
        if self._row_mask is not None or 8 * (self.columns.shape[1] + self._same_image.shape[1]) > num_candidates:
            return None
        barred = torch.cat([~self._negative, self._has_image.expand_as(self._same_image)], 1)
        columns = torch.cat([self.columns, self._same_image], 1)
        num_valid: int | Tensor = num_candidates
        if self._valid is not None:
            barred &= self._valid[columns]
            num_valid = self._valid.sum()
        columns = columns.masked_fill(~barred, -1).sort(1).values  # a column may be there twice
        first = columns[:, 1:] != columns[:, :-1]
        return num_valid - (columns[:, 0] >= 0).long() - (first & (columns[:, 1:] >= 0)).sum(1)


class Relations:
    """Finds a query's group and image among G candidates by binary search, so that no [q, G] of integers is compared.

    Candidates must be in `Ids.order`. Making one waits for the device once.
    """

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        self._uid = ids.uid.contiguous()
        self._by_group = ids.group.argsort(stable=True)
        self._groups = ids.group[self._by_group]
        sizes = torch.unique_consecutive(self._groups, return_counts=True)[1]
        about = torch.stack([(ids.valid == 0).any(), (ids.view >= 2).any(), sizes.max()])
        invalid, explicit, self.widest = (int(n) for n in about.tolist())  # widest: the most candidates of one group
        self._valid = ids.valid.bool() if invalid else None
        self._explicit = ids.view >= 2 if explicit else None
        self.has_explicit = bool(explicit)

    def of(self, q: Ids, *, explicit_for_anchors: bool) -> Related:
        """Positive: the same group, and another image or another view of the same record. Negative: another group.

        The partner in a labelled pair that does not match, and a record's own explicit negatives (views 2..), are negatives
        whatever their group. An image is never its own negative. Invalid rows are nobody's. With `explicit_for_anchors`
        explicit negatives are candidates of anchors (view 0) only.
        """
        place, in_group = _stretch(self._groups, q.group)
        columns = self._by_group[place]  # [q, P]
        c = self.ids.select(columns.flatten())
        uid, view, record = (t.view_as(columns) for t in (c.uid, c.view, c.record))
        same_image = uid == q.uid[:, None]
        own = (record == q.record[:, None]) & (view != q.view[:, None])
        explicit, is_anchor = view >= 2, (q.view == 0)[:, None]
        apart = own & ((explicit & is_anchor) | (c.match.view_as(columns) == 0))
        seen = (c.valid.view_as(columns) == 1) & (q.valid == 1)[:, None] & in_group
        if explicit_for_anchors:
            seen &= is_anchor | ~explicit
        place, has_image = _stretch(self._uid, q.uid)
        limited = explicit_for_anchors and self._explicit is not None
        return Related(
            columns=columns,
            is_positive=seen & (~same_image | own) & ~apart,
            _negative=(apart & ~same_image) | ~in_group.any(1, keepdim=True),
            _same_image=place,
            _has_image=has_image.any(1, keepdim=True),
            _row_mask=~is_anchor if limited else None,
            _column_mask=self._explicit if limited else None,
            _valid=self._valid,
        )


def _stretch(ordered: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where `wanted` [q] lies in `ordered` [G]: places [q, L], and whether each is one; the rest repeats the last."""
    wanted = wanted.contiguous()
    first, end = torch.searchsorted(ordered, wanted), torch.searchsorted(ordered, wanted, right=True)
    count = end - first
    step = torch.arange(max(1, int(count.max())) if len(count) else 1, device=ordered.device)
    place = first[:, None] + torch.minimum(step[None, :], (count - 1).clamp_min(0)[:, None])
    return place.clamp_max(len(ordered) - 1), step[None, :] < count[:, None]


def _fill(matrix: Tensor, columns: Tensor, where: Tensor, value: float) -> None:
    kept = matrix.gather(1, columns)
    matrix.scatter_(1, columns, kept.masked_fill_(where, value))


def complete(num_rows: Sequence[int], group: Tensor, *, needs_view: bool, **given: Tensor | None) -> Ids:
    """Fill in what the caller left out, check shapes, and make `record` global."""
    if given["view"] is None and needs_view:
        raise ValueError("queries: anchors and candidates: other_view need `view`: 0 anchor, 1 positive, 2.. negatives")
    n, device, start = num_rows[collectives.rank()], group.device, sum(num_rows[: collectives.rank()])
    for name, tensor in (("group", group), *given.items()):
        if tensor is not None and name != "match" and tensor.shape != (n,):
            raise ValueError(f"{name}: expected shape [{n}], one number for each vector, got {list(tensor.shape)}")
    row = torch.arange(start, start + n, device=device)
    record, match, valid = given["record"], given["match"], given["valid"]
    if match is not None and record is None:
        raise ValueError("match needs record: it says which pair every row belongs to")
    ones = torch.ones_like(row)
    return Ids(
        group=group.long(),
        uid=row if given["uid"] is None else given["uid"].long(),
        view=torch.zeros_like(row) if given["view"] is None else given["view"].long(),
        # Records are numbered from 0 on every rank; a rank has no more records than rows, so its first row is a safe offset.
        record=row if record is None else record.long() + start,
        match=ones if match is None or record is None else match.long()[record],
        valid=ones if valid is None else valid.long(),
    )
