"""Retrieval metrics, exact and in chunks: never an [N, N] matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)


def retrieval_sums(
    queries: Tensor,
    query_group: Tensor,
    query_index: Tensor,
    gallery: Tensor,
    gallery_group: Tensor,
    *,
    chunk: int = 1024,
) -> dict[str, Tensor]:
    """Sums over queries [q, D] searched in gallery [G, D] by dot product, themselves left out; float64 scalars.

    `query_index` [q]: each query's own row in the gallery. Queries without another member of their group do not count.
    MAP@R as in Musgrave et al. 2020: mean over the R nearest of precision at i where the i-th is right, R = number of
    others in the group.
    """
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("num_queries", "map_at_r", *map(recall_name, RECALL_AT))}
    groups, inverse = torch.unique(gallery_group, return_inverse=True)
    members = torch.bincount(inverse)
    for part in torch.split(torch.arange(queries.shape[0], device=queries.device), chunk):
        others = members[torch.searchsorted(groups, query_group[part])] - 1  # [c]
        part, others = part[others > 0], others[others > 0]
        if not part.numel():
            continue
        scores = queries[part] @ gallery.T  # [c, G]
        scores.scatter_(1, query_index[part][:, None], -torch.inf)
        depth = min(gallery.shape[0] - 1, max(int(others.max()), *RECALL_AT))
        nearest = scores.topk(depth, dim=1).indices  # [c, depth]
        right = gallery_group[nearest] == query_group[part][:, None]
        _add(sums, right, others)
    return sums


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums of all ranks to metrics; NaN-free: without queries every metric is 0."""
    count = max(1.0, float(sums["num_queries"]))
    return {name: float(value) / count for name, value in sums.items() if name != "num_queries"}


def recall_name(k: int) -> str:
    return f"recall_at_{k}"


def names() -> Sequence[str]:
    """The metrics an evaluation reports."""
    return [*map(recall_name, RECALL_AT), "map_at_r"]


def _add(sums: dict[str, Tensor], right: Tensor, others: Tensor) -> None:
    sums["num_queries"] += right.shape[0]
    for k in RECALL_AT:
        sums[recall_name(k)] += right[:, :k].any(1).sum().cpu()
    rank = torch.arange(1, right.shape[1] + 1, device=right.device, dtype=torch.float64)
    within = right & (rank[None, :] <= others[:, None])
    precision = within.cumsum(1) / rank
    sums["map_at_r"] += ((precision * within).sum(1) / others).sum().cpu()
