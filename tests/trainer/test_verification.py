"""Verification against scikit-learn's curves, and against loops over thresholds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score, roc_curve
from sklearn.model_selection import KFold
from torch import Tensor

from configs.evaluation import expand
from tests.trainer.embeddings import NUM_RANDOM, REAL, Set, random_set
from trainer.evaluate import Embedded
from trainer.measurement import measure
from trainer.pairs import Pairs, every_pair, given_pairs
from trainer.protocol import Protocol, self_retrieval
from trainer.spread import uniformity
from trainer.verification import in_folds, match_thresholds, verification

SETS: dict[str, Callable[[], Set]] = {**{f"random {s}": partial(random_set, s) for s in range(NUM_RANDOM)}, **REAL}


def all_pairs(found: Set) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and labels of all pairs, by numpy."""
    first, second = np.triu_indices(len(found.group), 1)
    scores = found.vectors.numpy() @ found.vectors.numpy().T
    group = found.group.numpy()
    return scores[first, second], group[first] == group[second]


def by_scikit_learn(score: np.ndarray, same: np.ndarray) -> dict[str, float]:
    false, true, _ = roc_curve(same, score, drop_intermediate=False)
    found = {f"tar_at_far_1e-{n}": float(true[false <= 10.0**-n].max()) for n in (1, 2, 3, 4)}
    found["roc_auc"] = float(roc_auc_score(same, score))
    found["eer"] = float(brentq(lambda x: 1 - x - interp1d(false, true)(x), 0, 1))
    return found


@pytest.mark.parametrize("name", SETS)
def test_numbers_and_thresholds_are_those_of_scikit_learn(name: str) -> None:
    found = SETS[name]()
    score, same = all_pairs(found)
    ours = verification(every_pair(self_retrieval(found.vectors, found.group)))
    for metric, value in by_scikit_learn(score, same).items():
        assert ours[metric] == pytest.approx(value, abs=1e-6), metric
    assert ours["accuracy"] == pytest.approx(accuracy_score(same, score >= ours["threshold_accuracy"]), abs=1e-6)
    assert ours["f1"] == pytest.approx(f1_score(same, score >= ours["threshold_f1"]), abs=1e-6)
    for threshold in np.quantile(score, np.linspace(0, 1, 20)):
        assert accuracy_score(same, score >= threshold) <= ours["accuracy"] + 1e-12
        assert f1_score(same, score >= threshold, zero_division=0) <= ours["f1"] + 1e-12
    accepted = score >= ours["threshold_far_1e-3"]
    assert accepted[~same].mean() <= 1e-3
    assert accepted[same].mean() == pytest.approx(ours["tar_at_far_1e-3"], abs=1e-6)


def test_thresholds_for_a_model_to_carry_are_those_of_the_metrics() -> None:
    found = random_set(0)
    ours = verification(every_pair(self_retrieval(found.vectors, found.group)))
    thresholds = match_thresholds(found.vectors, found.group)
    assert thresholds["far_1e-3"] == ours["threshold_far_1e-3"]
    assert thresholds["best_f1"] == ours["threshold_f1"]
    with pytest.raises(ValueError, match="pairs of the same thing"):
        match_thresholds(torch.eye(3), torch.arange(3))


def naive(protocol: Protocol) -> tuple[list[float], list[float]]:
    """Cosines of the pairs alike and of the others, by loops."""
    found: tuple[list[float], list[float]] = ([], [])
    for i in range(len(protocol.group)):
        for j in range(i + 1 if protocol.same else 0, len(protocol.gallery_group)):
            if protocol.part is not None and protocol.gallery_part is not None and protocol.part[i] == protocol.gallery_part[j]:
                continue
            alike = bool(protocol.group[i] == protocol.gallery_group[j])
            found[0 if alike else 1].append(float(protocol.vectors[i] @ protocol.gallery[j]))
    return tuple(map(sorted, found))  # type: ignore[return-value]


def protocols() -> dict[str, Protocol]:
    found = random_set(4)
    x, group = found.vectors[:90], found.group[:90]
    part = torch.arange(90) % 4
    return {
        "itself": self_retrieval(x, group),
        "itself, across": Protocol(x, group, x, group, part=part, gallery_part=part),
        "a gallery": Protocol(x[:30], group[:30], x[30:], group[30:], same=False),
        "a gallery, across": Protocol(
            x[:30], group[:30], x[30:], group[30:], same=False, part=part[:30], gallery_part=part[30:]
        ),
    }


@pytest.mark.parametrize("name", protocols())
@pytest.mark.parametrize("limit", [10**6, 100])
def test_pairs_are_all_that_may_meet_each_once(name: str, limit: int) -> None:
    protocol = protocols()[name]
    pairs = every_pair(protocol, limit=limit, sample=10**6)  # with the small limit each pair is made on its own
    for ours, theirs in zip((pairs.same, pairs.different), naive(protocol), strict=True):
        assert ours.sort().values.tolist() == pytest.approx(theirs, abs=1e-12)
    assert (pairs.num_same, pairs.num_different) == tuple(map(len, naive(protocol)))
    assert not pairs.sampled


@pytest.mark.parametrize("name", protocols())
def test_a_sample_of_pairs_estimates_what_all_of_them_give(name: str) -> None:
    protocol = protocols()[name]
    whole = verification(every_pair(protocol))
    drawn = every_pair(protocol, limit=10, sample=20)
    assert (len(drawn.same), len(drawn.different)) == (20, 20)
    assert drawn.sampled
    again = every_pair(protocol, limit=10, sample=20)
    assert torch.equal(drawn.same, again.same)
    assert torch.equal(drawn.different, again.different)
    largest = every_pair(protocol, limit=10, sample=max(21, min(drawn.num_same, drawn.num_different) - 1))
    estimate = verification(Pairs(largest.same, largest.different, drawn.num_same, drawn.num_different))
    for metric in ("roc_auc", "eer", "accuracy"):
        assert estimate[metric] == pytest.approx(whole[metric], abs=0.15)
    assert set(drawn.same.tolist()) <= set(every_pair(protocol, limit=10, sample=10**6).same.tolist())


def judged(number: int, seed: int) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(seed)
    match = random.integers(0, 2, number)
    score = np.round(match * 0.4 + random.normal(0, 0.3, number), 1 if seed % 2 else 9)  # with ties, and without
    return torch.from_numpy(score), torch.from_numpy(match)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("number", [600, 37])
def test_ten_folds_are_those_of_loops_over_thresholds(number: int, seed: int) -> None:
    score, match = judged(number, seed)
    values, truth = score.numpy(), match.numpy() == 1
    expected = []
    for train, test in KFold(10).split(values):
        levels = np.unique(values[train])[::-1]
        borders = np.concatenate([[levels[0] + 1e-6], levels, [levels[-1] - 1e-6]])
        candidates = (borders[1:] + borders[:-1]) / 2
        best = max(candidates, key=lambda t: (((values[train] >= t) == truth[train]).mean(), t))
        expected.append(((values[test] >= best) == truth[test]).mean())
    found = in_folds(score, match)
    assert found["accuracy_10_folds"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert found["accuracy_10_folds_error"] == pytest.approx(np.std(expected, ddof=1) / 10**0.5, abs=1e-9)


def test_pairs_that_a_person_judged_are_counted_as_given() -> None:
    left, right = torch.eye(3)[[0, 1, 2]], torch.eye(3)[[0, 2, 2]]
    pairs = given_pairs((left * right).sum(1), torch.tensor([1, 0, 0]))
    assert (pairs.same.tolist(), pairs.different.tolist()) == ([1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="10 folds"):
        in_folds(torch.ones(3), torch.ones(3))


def test_judged_pairs_of_which_an_image_is_missing_do_not_count() -> None:
    found = random_set(0)
    rows = torch.arange(40)
    sample = torch.stack([rows // 20, rows % 20 // 2, rows % 2], dim=1)
    there = torch.ones(40, dtype=torch.bool).index_fill_(0, torch.tensor([0, 7, 22]), False)
    match = (rows // 2) % 2
    group = torch.where(rows % 2 == 1, rows - match, rows)  # the right side of a match shows what the left side shows
    embedded = Embedded(found.vectors[:40][there], group[there], sample[there], match[there])
    ours = measure(embedded, expand(("verification", "folds", "uniformity")))
    left = torch.tensor([i for i in range(0, 40, 2) if i not in (0, 6, 22)])
    score = (found.vectors[left] * found.vectors[left + 1]).sum(1)
    expected = by_scikit_learn(score.numpy(), match[left].numpy() == 1) | in_folds(score, match[left])
    assert {name: ours.values[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert ours.pairs["same"] + ours.pairs["different"] == 17
    whole = every_pair(self_retrieval(embedded.vectors, embedded.group))
    assert ours.values["uniformity"] == pytest.approx(uniformity(whole))
