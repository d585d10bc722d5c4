"""Exact neighbours against a stable sort of all scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer import neighbours
from trainer.neighbours import Gallery, Hidden


def sorted_scores(queries: Tensor, gallery: Tensor, hidden: Hidden) -> tuple[Tensor, Tensor]:
    """All scores falling, of equal ones the lower row first."""
    scores = queries @ gallery.T
    if hidden.own is not None:
        scores[torch.arange(len(queries)), hidden.own] = -torch.inf
    if hidden.key is not None and hidden.gallery_key is not None:
        scores[torch.eq(*torch.meshgrid(hidden.key, hidden.gallery_key, indexing="ij"))] = -torch.inf
    return torch.sort(scores, dim=1, descending=True, stable=True)


def vectors(size: int, seed: int, *, ties: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-1, 2, (size, 3), generator=generator).double()
    return torch.randn(size, 5, generator=generator, dtype=torch.float64)


@pytest.fixture(params=["one panel", "many panels"])
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, so that a test meets borders."""
    if request.param == "many panels":
        monkeypatch.setattr(neighbours, "PANEL", 512)
        monkeypatch.setattr(neighbours, "TILE", 128)


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("size", "k"), [(1, 1), (63, 10), (700, 3), (2100, 10), (1500, 700), (300, 300)])
def test_neighbours_are_those_of_a_stable_sort(size: int, k: int, ties: bool) -> None:
    gallery = vectors(size, size, ties=ties)
    queries, own = gallery[:40], torch.arange(len(gallery[:40]))
    keys = {"key": own % 3, "gallery_key": torch.arange(size) % 3}
    for hidden in (Hidden(), Hidden(own=own), Hidden(**keys), Hidden(own=(own + 1) % size, **keys)):
        score, row = sorted_scores(queries, gallery, hidden)
        found = Gallery(gallery).nearest(queries, k, hidden)
        assert torch.equal(found.score, score[:, :k])
        there = found.score > -torch.inf
        assert torch.equal(found.row[there], row[:, :k][there])
        assert int(found.row.max()) < size


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("ties", [False, True])
def test_the_place_of_the_first_right_one_is_that_of_a_stable_sort(ties: bool) -> None:
    gallery, group = vectors(900, 1, ties=ties), torch.randint(0, 300, (900,), generator=torch.Generator().manual_seed(2))
    hidden = Hidden(own=torch.arange(900))
    score, row = sorted_scores(gallery, gallery, hidden)
    right = (group[row] == group[:, None]) & (score > -torch.inf)
    some = right.any(1).nonzero()[:, 0]
    found = Gallery(gallery).first_rank(gallery[some], group[some], group, hidden.of(some))
    assert torch.equal(found, right[some].int().argmax(1) + 1)
    assert int(found.max()) > 100


def test_when_all_vectors_are_one_the_first_rows_are_the_nearest() -> None:
    gallery = torch.ones(5000, 4)
    found = Gallery(gallery).nearest(gallery[:3], 4, Hidden(own=torch.tensor([0, 2, 4999])))
    assert found.row.tolist() == [[1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3]]


def test_queries_in_any_company_find_the_same() -> None:
    gallery = torch.nn.functional.normalize(torch.randn(3000, 32, generator=torch.Generator().manual_seed(0)))
    whole = Gallery(gallery)
    together = whole.nearest(gallery[:200], 10)
    for rows in torch.split(torch.arange(200), 37):
        assert torch.equal(whole.nearest(gallery[rows], 10).row, together.row[rows])
