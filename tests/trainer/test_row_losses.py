"""Row losses against other implementations and published formulas."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import mining
from trainer.objective import build_objective
from trainer.random_keys import uniform


def run(loss: dict[str, Any], x: Tensor, group: Tensor, **ids: Any) -> tuple[float, Tensor, dict[str, Tensor]]:
    leaf = x.clone().requires_grad_()
    value, stats = build_objective({**loss})(leaf, group, **ids)
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad, stats


def matches(loss: dict[str, Any], x: Tensor, group: Tensor, reference: Tensor, leaf: Tensor, **ids: Any) -> None:
    """Value and gradient equal those of `reference`, made from `leaf`, to 1e-6 or better."""
    value, grad, _ = run(loss, x, group, **ids)
    (expected,) = torch.autograd.grad(reference, leaf, retain_graph=True)
    assert value == pytest.approx(float(reference.detach()), rel=1e-9)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


def labelled(n: int = 32, per_class: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, the same as a leaf, classes."""
    x = torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, x.clone().requires_grad_(), torch.arange(n) // per_class


def distances(v: Tensor) -> Tensor:
    squared = (2 - 2 * v @ v.T).clamp_min(0)
    return torch.where(squared > 1e-12, squared, torch.ones_like(squared)).sqrt() * (squared > 1e-12)


def test_triplets_equal_those_of_pytorch_metric_learning() -> None:
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses, miners

    x, leaf, group = labelled()
    matches({"name": "triplet", "miner": "all"}, x, group, losses.TripletMarginLoss(margin=0.2)(leaf, group), leaf)
    chosen = miners.BatchHardMiner()(leaf, group)
    from pytorch_metric_learning.reducers import MeanReducer

    reference = losses.TripletMarginLoss(margin=0.2, reducer=MeanReducer())(leaf, group, chosen)
    matches({"name": "triplet", "miner": "batch_hard"}, x, group, reference, leaf)


def test_pair_weighting_losses_equal_those_of_pytorch_metric_learning() -> None:
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses, miners

    x, leaf, group = labelled()
    chosen = miners.MultiSimilarityMiner(epsilon=0.1)(leaf, group)
    reference = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)(leaf, group, chosen)
    matches({"name": "multi_similarity"}, x, group, reference, leaf)
    reference = losses.CircleLoss(m=0.4, gamma=80)(leaf, group)
    matches({"name": "circle", "margin": 0.4, "scale": 80}, x, group, reference, leaf)
    reference = losses.LiftedStructureLoss(neg_margin=1, pos_margin=0)(leaf, group)
    matches({"name": "lifted_structure"}, x, group, reference, leaf)


def test_semi_hard_is_the_masked_minimum_and_maximum_of_tensorflow() -> None:
    x, leaf, group = labelled()
    squared = 2 - 2 * F.normalize(leaf) @ F.normalize(leaf).T
    terms = []
    for a, p in itertools.permutations(range(len(x)), 2):
        if group[a] == group[p]:
            row, apart = squared[a], group != group[a]
            outside = apart & (row > row[p])
            inside = row.min() if not apart.any() else row.where(apart, row.min()).max()
            chosen = row.where(outside, row.max()).min() if outside.any() else inside
            terms.append((row[p] - chosen + 1.0).clamp_min(0))
    loss = {"name": "triplet", "miner": "semi_hard", "margin": 1.0, "distance": "squared_euclidean"}
    matches(loss, x, group, torch.stack(terms).mean(), leaf)


def test_online_contrastive_is_that_of_siamese_triplet_on_raw_vectors() -> None:
    x, leaf, group = labelled(12, 3)
    same = torch.tensor([(i, j) for i, j in itertools.combinations(range(12), 2) if group[i] == group[j]])
    apart = torch.tensor([(i, j) for i, j in itertools.combinations(range(12), 2) if group[i] != group[j]])

    def distance(pairs: Tensor) -> Tensor:
        return (leaf[pairs[:, 0]] - leaf[pairs[:, 1]]).pow(2).sum(1)

    hardest = apart[distance(apart).argsort()[: len(same)]]
    for balance, negatives in (("none", apart), ("hardest", hardest)):
        terms = torch.cat([distance(same), F.relu(3.0 - distance(negatives).sqrt()).pow(2)])
        loss = {"name": "contrastive", "margin": 3.0, "normalize": False, "balance": balance}
        matches(loss, x, group, terms.mean(), leaf)
        assert float(run(loss, x, group)[2]["num_terms"]) == len(terms)


def test_a_balanced_sample_has_as_many_negatives_as_positives_and_changes_with_the_step() -> None:
    x, _, group = labelled()
    loss = {"name": "contrastive", "balance": "sample"}
    found = [run(loss, x, group, step=step) for step in (0, 0, 1)]
    assert [float(stats["num_terms"]) for _, _, stats in found] == [2 * 48.0] * 3
    assert found[0][0] == found[1][0] != found[2][0]


def test_unordered_pairs_are_those_of_siamese_triplet() -> None:
    x, leaf, group = labelled(12, 3)
    d = distances(F.normalize(leaf))
    terms = [
        F.relu(d[a, p] - d[a, n] + 0.2)
        for a, p in itertools.combinations(range(12), 2)
        for n in range(12)
        if group[a] == group[p] != group[n]
    ]
    loss = {"name": "triplet", "miner": "all", "pairs": "unordered", "mean_over": "all"}
    matches(loss, x, group, torch.stack(terms).mean(), leaf)


def two_views(n: int = 10) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = torch.randn(2 * n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    row = torch.arange(2 * n)
    return x, x.clone().requires_grad_(), {"group": row // 2, "view": row % 2, "record": row // 2}


def test_sigmoid_over_pairs_is_siglips_loss() -> None:
    x, leaf, ids = two_views()
    left, right = F.normalize(leaf)[::2], F.normalize(leaf)[1::2]
    logits = left @ right.T * 10 - 10
    reference = -F.logsigmoid((2 * torch.eye(10) - 1) * logits).sum() / 10
    matches({"name": "sigmoid", "queries": "anchors", "candidates": "other_view"}, x, reference=reference, leaf=leaf, **ids)


@pytest.mark.parametrize("over", ["sum", "hardest"])
def test_max_margin_over_pairs_is_vse(over: str) -> None:
    x, leaf, ids = two_views()
    scores = F.normalize(leaf)[::2] @ F.normalize(leaf)[1::2].T
    apart = 1 - torch.eye(10)
    to_right = F.relu(0.2 + scores - scores.diagonal()[:, None]) * apart
    to_left = F.relu(0.2 + scores - scores.diagonal()[None, :]) * apart
    reference = to_right.sum() + to_left.sum() if over == "sum" else to_right.amax(1).sum() + to_left.amax(0).sum()
    for queries in ("anchors", "all"):
        loss = {"name": "max_margin", "over": over, "queries": queries, "candidates": "other_view"}
        matches(loss, x, reference=reference / 10, leaf=leaf, **ids)


def test_recall_at_k_is_that_of_its_authors() -> None:
    x, leaf, group = labelled()
    s = F.normalize(leaf) @ F.normalize(leaf).T
    total = torch.zeros((), dtype=torch.float64)
    for q in range(32):
        rank = [1 + sum(((s[q, z] - s[q, p]) / 0.01).sigmoid() for z in range(32) if z not in (q, p))
                for p in range(32) if group[p] == group[q] and p != q]  # fmt: skip
        for k in (1, 2, 4, 8, 16):
            recall = torch.stack([(k - r).sigmoid() for r in rank]).sum().clamp_max(k) / min(k, 3)
            total = total + (1 - recall) / 5 / 32
    matches({"name": "recall_at_k"}, x, group, total, leaf)


def test_hand_computed_margin_loss() -> None:
    angle = torch.tensor([0.0, 60.0, 90.0], dtype=torch.float64).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)  # chords: 0-1 is 1, 0-2 is sqrt 2, 1-2 is 2 sin 15 degrees
    group = torch.tensor([0, 0, 1])
    near, chord = 1 - 1.1 + 0.2, 2 * torch.deg2rad(torch.tensor(15.0)).sin()
    expected = (2 * near + 2 * (1.1 + 0.2 - chord)) / 4  # the pair at sqrt 2 is beyond beta + margin
    value, _, stats = run({"name": "margin", "miner": "all", "beta": 1.1}, x, group)
    assert value == pytest.approx(float(expected), rel=1e-6)
    assert float(stats["num_terms"]) == 4


def test_draws_follow_the_weights() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0], [0.0] * 5])
    chance = uniform(3, torch.arange(8000)).expand(2, -1).contiguous()
    columns, exists = mining.draw(weight, chance)
    share = torch.bincount(columns[0], minlength=5) / 8000
    assert exists[0].all()
    assert not exists[1].any()
    torch.testing.assert_close(share, torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]), atol=0.02, rtol=0)


def test_whole_sums_grow_with_the_weights_and_stand_still_where_they_are_0() -> None:
    weight = torch.rand(5, 3000) ** 8 * torch.tensor([[1.0], [1e-30], [1e30], [1.0], [0.0]])
    weight[3, 7:] = 0
    sums = mining._whole_sums(weight)
    expected = weight.double().cumsum(1)
    torch.testing.assert_close(sums[:4] / sums[:4, -1:].double(), expected[:4] / expected[:4, -1:], rtol=0, atol=1e-6)
    assert int(sums.max()) <= mining.LARGEST_SUM
    assert bool((sums.diff(dim=1)[weight[:, 1:] == 0] == 0).all())
    assert not sums[4].any()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"miner": "all", "swap": True}, "loss.swap: belongs to given triplets"),
        ({"pairs": "unordered"}, "loss.pairs: needs a miner"),
        ({"miner": "batch_hard", "pairs": "unordered"}, "loss.pairs: batch_hard has one term per anchor"),
        ({"miner": "hard"}, "loss.miner"),
    ],
)
def test_options_that_do_not_fit_are_refused(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective({"name": "triplet", **loss})


def test_each_pair_of_two_views_counts_once_whoever_asks() -> None:
    x, leaf, ids = two_views()
    v = F.normalize(leaf)
    squared = 2 - 2 * v[::2] @ v[1::2].T
    same = torch.eye(10, dtype=torch.bool)
    reference = (squared[same].sum() + F.relu(1 - squared[~same].sqrt()).pow(2).sum()) / 100
    for queries in ("anchors", "all"):
        loss = {"name": "contrastive", "queries": queries, "candidates": "other_view"}
        matches(loss, x, reference=reference, leaf=leaf, **ids)
        assert float(run(loss, x, **ids)[2]["num_terms"]) == 100


@pytest.mark.parametrize("name", ["contrastive", "lifted_structure"])
def test_what_memory_holds_is_met_by_every_query(name: str) -> None:
    x, _, group = labelled(8, 2)
    objective = build_objective({"name": name, "memory": 8})
    (_, first), (_, second) = (objective(x, group, uid=torch.arange(8) + 8 * step) for step in (0, 1))
    pairs = {"contrastive": (28, 28 + 64), "lifted_structure": (8, 8 + 16)}[name]
    assert (float(first["num_terms"]), float(second["num_terms"])) == pairs


def test_contrastive_with_labelled_pairs_takes_them_as_given() -> None:
    x, leaf, ids = two_views(4)
    match = torch.tensor([1, 0, 1, 0])
    d = F.normalize(leaf)[::2].sub(F.normalize(leaf)[1::2]).norm(dim=1)
    reference = torch.where(match == 1, d**2, F.relu(1 - d) ** 2).mean() / 2
    matches({"name": "contrastive", "half": True}, x, reference=reference, leaf=leaf, match=match, **ids)
