"""The share of given triplets that are in order, against a loop."""

from __future__ import annotations

import pytest
import torch

from trainer.evaluate import Embedded
from trainer.measurement import measure
from trainer.triplets import triplet_accuracy


def given(raw: bool) -> Embedded:
    """Records of one to three negatives, and one whose negatives could not be read."""
    views = [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1], [0, 1, 2, 3], [0, 1, 2]]
    sample = torch.tensor([[record // 3, record, view] for record, of in enumerate(views) for view in of])
    vectors = torch.randn(len(sample), 4, generator=torch.Generator().manual_seed(3))
    vectors[-1] = vectors[-2]  # a tie
    vectors = vectors if raw else torch.nn.functional.normalize(vectors, dim=1)
    return Embedded(vectors, torch.arange(len(sample)) // 2, sample, raw=raw)


@pytest.mark.parametrize("raw", [False, True])
def test_the_share_is_that_of_a_loop(raw: bool) -> None:
    found = given(raw)
    rows = {(int(record), int(view)): found.vectors[i].double() for i, (_, record, view) in enumerate(found.sample)}
    points = []
    for (record, view), n in rows.items():
        if view >= 2:
            a, p = rows[record, 0], rows[record, 1]
            near, far = ((a - p).norm(), (a - n).norm()) if raw else (-(a @ p), -(a @ n))
            points.append(1.0 if near < far else 0.5 if near == far else 0.0)
    assert len(points) == 7
    assert 0.5 in points
    assert triplet_accuracy(found) == pytest.approx(sum(points) / 7)
    assert measure(found, ["triplet_accuracy"]).values == {"triplet_accuracy": pytest.approx(sum(points) / 7)}


def test_without_explicit_negatives_there_is_none() -> None:
    pairs = Embedded(torch.eye(4), torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]))
    assert triplet_accuracy(pairs) is None
    assert measure(pairs, ["triplet_accuracy"]).values == {}
