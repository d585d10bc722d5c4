"""What a report finds in embeddings, against loops over all pairs and against mistakes that were planted."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from trainer.report.confusion import clusters, named, title
from trainer.report.plane import choose, lay_out
from trainer.report.search import hardest_negatives, mistakes, search, suspects
from trainer.report.spread import spread


def blobs(classes: int, each: int, *, noise: float, dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors [N, dim] around the middle of their class, groups [N], and the middles [classes, dim]."""
    generator = torch.Generator().manual_seed(seed)
    middles = F.normalize(torch.randn(classes, dim, generator=generator), dim=1)
    group = torch.arange(classes).repeat_interleave(each)
    vectors = middles[group] + noise * torch.randn(classes * each, dim, generator=generator)
    return F.normalize(vectors, dim=1), group, middles


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_search_is_what_a_loop_finds(chunk: int) -> None:
    vectors, group, _ = blobs(7, 5, noise=0.4)
    group[-1] = 99  # alone in its class
    found = search(vectors, group, 6, chunk=chunk)
    for row in range(len(group)):
        ranked = sorted((i for i in range(len(group)) if i != row), key=lambda i: -float(vectors[row] @ vectors[i]))
        right = [place for place, i in enumerate(ranked, 1) if group[i] == group[row]]
        assert found.nearest[row].tolist() == ranked[:6]
        assert int(found.right_rank[row]) == (right[0] if right else 0)
        assert int(found.right[row]) == (ranked[right[0] - 1] if right else -1)
        assert int(found.other[row]) == next(i for i in ranked if group[i] != group[row])
        assert int(found.others[row]) == len(right)
        assert bool(found.wrong[row]) == (bool(right) and right[0] != 1)


def test_the_hardest_negatives_and_the_worst_mistakes_are_those_of_a_loop() -> None:
    vectors, group, _ = blobs(6, 4, noise=0.5)
    found, rows = search(vectors, group, 5), range(len(group))
    pairs = [(float(vectors[a] @ vectors[b]), a, b) for a, b in itertools.combinations(rows, 2) if group[a] != group[b]]
    best: dict[frozenset[int], float] = {}
    for score, a, b in sorted(pairs, reverse=True):
        best.setdefault(frozenset((int(group[a]), int(group[b]))), score)
    first = hardest_negatives(found, 1)[0]
    assert first.cosine == pytest.approx(max(best.values()), abs=1e-6)
    listed = hardest_negatives(found, 100)
    assert len({frozenset((int(group[p.first]), int(group[p.second]))) for p in listed}) == len(listed)
    assert [p.cosine for p in listed] == sorted((p.cosine for p in listed), reverse=True)
    lead = found.cosine[:, 0] - found.right_cosine
    worst = mistakes(found, 3)
    assert worst[0] == int(torch.where(found.wrong, lead, -torch.inf).argmax())
    assert all(found.wrong[row] for row in worst)


def test_a_wrong_label_is_suspected_and_the_right_ones_are_not() -> None:
    vectors, group, _ = blobs(8, 6, noise=0.05)
    group[3] = 5  # lies among class 0, is called 5
    listed = suspects(search(vectors, group), 10)
    assert [(s.row, s.group) for s in listed] == [(3, 0)]
    assert set(listed[0].neighbours) == {0, 1, 2, 4, 5}


def test_clusters_that_were_planted_are_found_and_named_by_what_their_names_share() -> None:
    vectors, group, middles = blobs(120, 4, noise=0.05, dim=32)
    flags, clocks = [3, 50, 77, 90, 101], [10, 11, 60]
    generator = torch.Generator().manual_seed(1)
    for members, middle in ((flags, middles[3]), (clocks, middles[10])):  # all of them at one place
        rows = torch.isin(group, torch.tensor(members))
        noise = 0.05 * torch.randn(int(rows.sum()), 32, generator=generator)
        vectors[rows] = F.normalize(middle + noise, dim=1)
    found = search(vectors, group)
    listed = clusters(found, 5)
    assert [sorted(c.groups) for c in listed] == [flags, clocks]
    assert listed[0].searches == 20
    assert listed[0].missed == int(found.wrong[torch.isin(group, torch.tensor(flags))].sum()) > 10
    names = {g: f"flag: Land {g}" for g in flags} | {g: f"clock face {g}" for g in clocks}
    assert [named(c, lambda g: names[g]) for c in listed] == ["flag land", "clock face"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["flag: Mali", "flag: Peru", "sun"], "flag: Mali, flag: Peru, sun"),
        (["flag: Mali", "flag: Peru", "flag: Oman", "sun"], "flag"),
        (["red shoe", "red boot"], "red"),
        (["n01", "n02"], "n01 and n02"),
        (["a", "b", "c", "d"], "a, b, c \u2026"),
        (["猫 一", "猫 二", "猫 三"], "猫"),
        (["7"], "7"),
    ],
)
def test_a_title_is_what_the_names_share(names: list[str], expected: str) -> None:
    assert title(names) == expected.replace(", sun", " and sun")


def test_without_mistakes_there_are_no_clusters() -> None:
    vectors, group, _ = blobs(12, 4, noise=0.01)
    found = search(vectors, group)
    assert not clusters(found, 5)
    assert not mistakes(found, 5)
    assert not suspects(found, 5)


def test_how_often_the_same_is_nearer_is_the_area_under_the_curve() -> None:
    vectors, group, _ = blobs(9, 6, noise=0.5)
    pairs = list(itertools.combinations(range(len(group)), 2))
    same = [bool(group[a] == group[b]) for a, b in pairs]
    found = spread(vectors, group, chunk=10)
    assert int(found.positive.sum()) == 2 * sum(same)
    assert int(found.negative.sum()) == 2 * (len(pairs) - sum(same))
    assert found.nearer == pytest.approx(roc_auc_score(same, [float(vectors[a] @ vectors[b]) for a, b in pairs]), abs=2e-3)


def test_one_class_alone_has_no_curve() -> None:
    found = spread(F.normalize(torch.ones(2, 4), dim=1), torch.tensor([5, 5]))
    assert found.nearer is None
    assert found.least < 1


def test_the_plane_is_that_of_the_largest_variances_and_the_same_each_time() -> None:
    from sklearn.decomposition import PCA

    vectors, group, _ = blobs(20, 4, noise=0.3)
    plane = lay_out(vectors)
    if plane.method == "UMAP":
        pytest.skip("umap-learn is installed, so the plane is its own")
    expected = torch.from_numpy(PCA(2).fit_transform(vectors.numpy()))
    centred = plane.points - plane.points.mean(0)
    for axis in range(2):
        assert abs(F.cosine_similarity(centred[:, axis], expected[:, axis], dim=0)) > 0.9999
    assert torch.equal(lay_out(vectors).points, plane.points)
    assert plane.points.min() >= 0
    assert plane.points.max() <= 1
    chosen = choose(plane.points, group, torch.ones(len(group), dtype=torch.bool))
    assert len({int(group[rows[0]]) for rows in chosen}) == len(chosen) > 3
    assert all(len({int(group[row]) for row in rows}) == 1 for rows in chosen)
