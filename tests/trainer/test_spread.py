"""Spread, clusters and confidence intervals against formulas written out, and scikit-learn's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.cluster import KMeans
from torch import Tensor

from tests.trainer.embeddings import REAL, random_set
from trainer import spread
from trainer.clustering import clustering
from trainer.confidence import intervals
from trainer.pairs import every_pair
from trainer.protocol import self_retrieval
from trainer.spread import alignment, effective_rank, uniformity


@pytest.mark.parametrize("seed", [0, 2, 4, 6])
def test_alignment_and_uniformity_are_the_formulas_of_the_paper(seed: int) -> None:
    found = random_set(seed)
    vectors = found.vectors[:100]
    x, group = vectors.tolist(), found.group[:100].tolist()
    pairs = [(i, j) for i in range(len(group)) for j in range(i)]
    apart = [sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True)) for i, j in pairs]
    alike = [d for d, (i, j) in zip(apart, pairs, strict=True) if group[i] == group[j]]
    whole = [math.exp(-2 * d) for d in apart]
    ours = every_pair(self_retrieval(vectors, found.group[:100]))
    assert alignment(ours.same) == pytest.approx(np.mean(alike), abs=1e-9)
    assert uniformity(ours) == pytest.approx(math.log(np.mean(whole)), abs=1e-9)
    drawn = every_pair(self_retrieval(vectors, found.group[:100]), limit=10, sample=2000)
    assert uniformity(drawn) == pytest.approx(uniformity(ours), abs=0.1)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(500, 16, 16), (500, 16, 3), (5, 16, 5), (500, 16, 1)])
def test_the_effective_rank_is_the_entropy_of_the_singular_values(
    rows: int, columns: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "AT_ONCE", 64)
    generator = torch.Generator().manual_seed(rows + rank)
    x = F.normalize(torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator))
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    share = values / values.sum()
    expected = math.exp(-sum(p * math.log(p) for p in share if p > 0))
    assert effective_rank(x) == pytest.approx(expected, abs=1e-6)
    assert effective_rank(x) < rank + 1e-3


@pytest.mark.parametrize("name", REAL)
def test_clusters_agree_with_classes_as_the_oracle_says(name: str) -> None:
    found = REAL[name]()

    def kmeans(vectors: Tensor, number: int) -> Tensor:
        return torch.from_numpy(KMeans(number, n_init=1, random_state=0).fit_predict(found.vectors.numpy()))

    calculator = AccuracyCalculator(include=("NMI", "AMI"), kmeans_func=kmeans, device=torch.device("cpu"))
    theirs = calculator.get_accuracy(found.vectors, found.group)
    ours = clustering(found.vectors, found.group, ("nmi", "ami"))
    assert ours == pytest.approx({"nmi": theirs["NMI"], "ami": theirs["AMI"]}, abs=1e-6)


def test_intervals_are_the_percentiles_of_resampled_classes() -> None:
    generator = np.random.default_rng(0)
    group = torch.from_numpy(generator.integers(0, 60, 400))
    values = torch.from_numpy(generator.random((2, 400)) < 0.7 + 0.3 * (group.numpy() % 2)).double()
    ours = intervals(values, group, resamples=4000)
    members = [values[:, group == c] for c in torch.unique(group).tolist()]
    means = []
    for _ in range(4000):
        drawn = torch.cat([members[c] for c in generator.integers(0, len(members), len(members))], dim=1)
        means.append(drawn.mean(1).numpy())
    expected = np.quantile(np.stack(means), [0.025, 0.975], axis=0).T
    assert ours.numpy() == pytest.approx(expected, abs=6e-3)
    assert torch.equal(ours, intervals(values, group, resamples=4000))
    assert bool((ours[:, 0] < values.mean(1)).all())
    assert bool((ours[:, 1] > values.mean(1)).all())


def test_images_of_one_class_that_stand_and_fall_together_widen_the_interval() -> None:
    alike = (torch.arange(400) // 40 % 2).double()[None]  # ten classes, right or wrong as a whole
    narrow, wide = (intervals(alike, group)[0] for group in (torch.arange(400), torch.arange(400) // 40))
    assert float(wide[1] - wide[0]) > 3 * float(narrow[1] - narrow[0])
