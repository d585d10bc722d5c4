"""Retrieval metrics against pytorch-metric-learning's, and against loops over sorted lists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor

from configs.evaluation import retrieval_names
from tests.trainer.embeddings import NUM_RANDOM, REAL, Set, random_set
from trainer import neighbours
from trainer.evaluate import Embedded
from trainer.measurement import Across, measure
from trainer.protocol import Protocol
from trainer.retrieval import per_query

ORACLE = {
    "precision_at_1": "precision_at_1",
    "r_precision": "r_precision",
    "map_at_r": "mean_average_precision_at_r",
    "mrr": "mean_reciprocal_rank",
}
KS = (1, 2, 5, 10, 100)


def embedded(found: Set, part: slice = slice(None)) -> Embedded:
    rows = torch.arange(len(found.group))
    sample = torch.stack([torch.zeros_like(rows), rows, torch.zeros_like(rows)], dim=1)
    return Embedded(found.vectors[part], found.group[part], sample[part])


def ranked(queries: Tensor, gallery: Tensor, *, same: bool) -> np.ndarray:
    """Rows of the gallery by falling cosine and rising number, by numpy; a query itself is last, where it is one of them."""
    scores = queries.numpy() @ gallery.numpy().T
    if same:
        np.fill_diagonal(scores, -np.inf)
    return np.lexsort((np.broadcast_to(np.arange(scores.shape[1]), scores.shape), -scores), axis=1)


def by_the_oracle(queries: Set, gallery: Set | None = None) -> dict[str, float]:
    """pytorch-metric-learning's numbers; it gets the order of the neighbours, since its own is undefined among ties."""
    order = torch.from_numpy(ranked(queries.vectors, (gallery or queries).vectors, same=gallery is None))

    def knn(query: Tensor, k: int, reference: Tensor, ref_includes_query: bool) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(order), k), order[:, :k]

    calculator = AccuracyCalculator(include=tuple(ORACLE.values()), knn_func=knn, device=torch.device("cpu"))
    small = torch.unique(torch.cat([queries.group, (gallery or queries).group]))  # it makes float32 of them
    labels = [torch.searchsorted(small, one.group.contiguous()) for one in (queries, gallery or queries)]
    more = () if gallery is None else (gallery.vectors, labels[1])
    found = calculator.get_accuracy(queries.vectors, labels[0], *more)
    return {name: found[theirs] for name, theirs in ORACLE.items()}


def recall_by_loops(queries: Set, gallery: Set | None = None) -> dict[str, float]:
    order = ranked(queries.vectors, (gallery or queries).vectors, same=gallery is None)
    among = (gallery or queries).group.numpy()
    if gallery is None:
        order = order[:, :-1]
    hits = among[order] == queries.group.numpy()[:, None]
    hits = hits[hits.any(1)]
    return {f"recall_at_{k}": float(hits[:, :k].any(1).mean()) for k in KS}


SETS: dict[str, Callable[[], Set]] = {**{f"random {s}": partial(random_set, s) for s in range(NUM_RANDOM)}, **REAL}


@pytest.mark.parametrize("name", SETS)
def test_self_retrieval_has_the_numbers_of_the_oracles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SETS[name]()
    if name not in REAL:
        monkeypatch.setattr(neighbours, "ROWS", 40)  # several blocks, of other depths
    ours = measure(embedded(found), retrieval_names(KS))
    expected = by_the_oracle(found) | recall_by_loops(found)
    assert ours.values == pytest.approx(expected, abs=1e-6)
    _, inverse, counts = torch.unique(found.group, return_inverse=True, return_counts=True)
    assert ours.queries == int((counts[inverse] > 1).sum())


@pytest.mark.parametrize("seed", range(NUM_RANDOM))
def test_a_gallery_of_its_own_has_the_numbers_of_the_oracles(seed: int) -> None:
    found = random_set(seed)
    third = len(found.group) // 3
    queries, gallery = (Set(found.vectors[p], found.group[p]) for p in (slice(0, third), slice(third, None)))
    ours = measure(embedded(queries), retrieval_names(KS), gallery=embedded(gallery))
    assert ours.values == pytest.approx(by_the_oracle(queries, gallery) | recall_by_loops(queries, gallery), abs=1e-6)
    assert (ours.images, ours.gallery) == (third, len(found.group) - third)


def test_float32_vectors_without_ties_have_the_numbers_of_faiss() -> None:
    for seed in (0, 2, 4):
        found = random_set(seed)
        calculator = AccuracyCalculator(include=tuple(ORACLE.values()), device=torch.device("cpu"))
        labels = torch.unique(found.group, return_inverse=True)[1]
        theirs = calculator.get_accuracy(found.vectors.float(), labels)
        ours = measure(embedded(Set(found.vectors.float(), found.group)), tuple(ORACLE))
        assert ours.values == pytest.approx({name: theirs[other] for name, other in ORACLE.items()}, abs=1e-6)


def across_by_loops(found: Set, part: list[int], *, only_class: bool) -> dict[str, float]:
    values: dict[str, list[float]] = {"recall_at_1": [], "map_at_r": []}
    scores, group = (found.vectors @ found.vectors.T).tolist(), found.group.tolist()
    for query in range(len(part)):
        among = [i for i in range(len(part)) if part[i] != part[query] or (only_class and group[i] != group[query])]
        among.sort(key=lambda i: (-scores[query][i], i))
        hits = [group[i] == group[query] for i in among]
        right = sum(hits)
        if right == 0:
            continue
        values["recall_at_1"].append(float(hits[0]))
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(right) if hits[i]]
        values["map_at_r"].append(sum(precisions) / right)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


@pytest.mark.parametrize("only_class", [False, True])
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_search_across_parts_finds_what_loops_find(seed: int, only_class: bool) -> None:
    found = random_set(seed)
    part = [i % 3 for i in range(len(found.group))]
    across = Across(lambda sample: sample[:, 1] % 3, lambda sample: sample[:, 1] % 3, only_class)
    ours = measure(embedded(found), ("recall_at_1", "map_at_r"), across=across)
    assert ours.values == pytest.approx(across_by_loops(found, part, only_class=only_class), abs=1e-9)
    assert sum(row["queries"] for row in ours.parts.values()) == ours.queries
    mean = sum(row["recall_at_1"] * row["queries"] for row in ours.parts.values()) / ours.queries
    assert mean == pytest.approx(ours.values["recall_at_1"])


def test_without_anything_to_find_all_metrics_are_zero() -> None:
    found = measure(embedded(Set(torch.eye(4), torch.arange(4))), retrieval_names(), resamples=10)
    assert set(found.values.values()) == {0.0}
    assert (found.queries, found.intervals) == (0, {})


def test_vectors_that_are_no_numbers_are_refused() -> None:
    vectors = torch.eye(4)
    vectors[2, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 4 vectors are not finite"):
        measure(embedded(Set(vectors, torch.zeros(4).long())), ("recall_at_1",))


def test_one_large_class_among_small_ones_costs_no_depth_for_the_others() -> None:
    group = torch.cat([torch.zeros(500), 1 + torch.arange(500) // 2]).long()
    vectors = torch.nn.functional.normalize(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)).double())
    depths: list[int] = []
    search = neighbours.Gallery.nearest

    def spied(self: neighbours.Gallery, queries: Tensor, k: int, hidden: neighbours.Hidden | None = None) -> object:
        depths.append(k)
        return search(self, queries, k, hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours.Gallery, "nearest", spied)
        per_query(Protocol(vectors, group, vectors, group), ("map_at_r",))
    assert sorted(set(depths)) == [1, 499]
