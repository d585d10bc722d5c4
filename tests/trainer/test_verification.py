"""Match thresholds are those of all pairs, one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainer.verification import match_thresholds


def test_thresholds_are_those_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(300) % 40
    centres = torch.randn(40, 16, generator=generator)
    vectors = F.normalize(centres[group] + 1.2 * torch.randn(300, 16, generator=generator), dim=1)
    pairs = [(float(vectors[i] @ vectors[j]), bool(group[i] == group[j])) for i in range(300) for j in range(i)]
    score, same = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    found = match_thresholds(vectors, group)
    assert (score[~same] >= found["far_1e-3"]).double().mean() <= 1e-3
    assert (score[~same] >= found["far_1e-3"] - 0.005).double().mean() > 1e-3

    def f1(threshold: float) -> float:
        accepted = score >= threshold
        return float(2 * (accepted & same).sum() / (accepted.sum() + same.sum()))

    assert f1(found["best_f1"]) == pytest.approx(max(f1(t) for t in score.tolist()[::7]), abs=2e-3)


def test_nothing_is_accepted_where_different_things_look_the_same() -> None:
    vectors = F.normalize(torch.ones(4, 3), dim=1)
    assert match_thresholds(vectors, torch.tensor([0, 0, 1, 1]))["far_1e-3"] == 1.0


@pytest.mark.parametrize("group", [[0, 1, 2], [0, 0, 0]])
def test_pairs_of_one_sort_tell_nothing(group: list[int]) -> None:
    with pytest.raises(ValueError, match="pairs of the same thing and pairs of different things"):
        match_thresholds(F.normalize(torch.randn(3, 4), dim=1), torch.tensor(group))
