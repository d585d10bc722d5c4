"""Losses of given records, targets and class centres equal torch's and published ones, and survive odd batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.centres import BLOCK, Centres, _draw
from trainer.objective import Objective, build_objective

CONTRASTIVE, TRIPLET = "trainer.losses.given:GivenContrastive", "trainer.losses.given:GivenTriplet"
LOSSES: list[dict[str, Any]] = [
    {"name": CONTRASTIVE},
    {"name": TRIPLET},
    {"name": TRIPLET, "soft": True, "eps": 0.0, "swap": True},
    {"name": "cosine_embedding"},
    {"name": "margin_ranking"},
    *({"name": "regress", "kind": kind} for kind in ("mse", "cosine", "sigmoid_ce")),
    *({"name": "distill", "kind": kind, "temperature": 0.01} for kind in ("similarity", "neighbours", "vector")),
    {"name": "softmax", "num_classes": 5, "dim": 8},
    {"name": "arcface", "num_classes": 5, "dim": 8, "sub_centers": 2},
    {"name": "proxy_anchor", "num_classes": 5, "dim": 8},
]


def single(loss: dict[str, Any]) -> Objective:
    objective = build_objective(loss)
    assert isinstance(objective, Objective)
    return objective


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(str(v) for v in loss.values() if isinstance(v, str)))
@pytest.mark.parametrize("case", ["zero", "identical", "one class", "all invalid", "bf16", "fp16", "single record"])
def test_degenerate_batches_give_a_finite_loss_and_gradient(loss: dict[str, Any], case: str) -> None:
    torch.manual_seed(0)
    n = 3 if case == "single record" else 12
    x, target = torch.randn(n, 8), torch.rand(n, 8)
    row, valid = torch.arange(n), torch.ones(n, dtype=torch.bool)
    group = row // 3 * (case != "one class")
    if case == "zero":
        x.zero_()
        target.zero_()
    elif case == "identical":
        x[:] = x[0]
    elif case == "all invalid":
        valid[:] = False
    elif case in ("bf16", "fp16"):
        x = x.to({"bf16": torch.bfloat16, "fp16": torch.float16}[case])
    x.requires_grad_()
    value, stats = single(loss)(x, group, view=row % 3, record=row // 3, valid=valid, target=target)
    value.backward()
    assert x.grad is not None
    assert x.grad.dtype == x.dtype
    assert all(torch.isfinite(number).all() for number in (value, x.grad, *stats.values()))
    if case == "all invalid":
        assert float(value.detach()) == 0
        assert not x.grad.any()


def compare(objective: Objective, rows: list[Tensor], reference: Any, match: Tensor | None = None, rtol: float = 1e-12) -> None:
    """rows: [n, D] of each view. Value and gradient equal those of `reference(*rows)`."""
    n, views = len(rows[0]), len(rows)
    x = torch.stack(rows, 1).flatten(0, 1).detach().requires_grad_()
    record, view = torch.arange(n * views) // views, torch.arange(n * views) % views
    value, _ = objective(x, record, record=record, view=view, match=match)
    value.backward()
    leaves = [row.clone().requires_grad_() for row in rows]
    expected = reference(*leaves)
    expected.backward()
    assert x.grad is not None
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=rtol, atol=0)
    grad = torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None], 1).flatten(0, 1)
    torch.testing.assert_close(x.grad, grad, rtol=max(rtol, 1e-9), atol=1e-14)


def vectors(views: int) -> list[Tensor]:
    return list(torch.randn(views, 20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"p": 1.0}, {"p": 3.0, "swap": True}, {"eps": 1e-3, "swap": True}])
def test_given_triplet_is_torchs_triplet_margin_loss(options: dict[str, Any]) -> None:
    objective = single({"name": TRIPLET, "margin": 1.0, "normalize": False, **options})
    compare(objective, vectors(3), lambda a, p, n: F.triplet_margin_loss(a, p, n, margin=1.0, **options))


def test_half_squared_triplet_is_the_caffe_layers() -> None:
    def layer(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return (((a - p) ** 2).sum(1) - ((a - n) ** 2).sum(1) + 1).clamp_min(0).sum() / (2 * len(a))

    options = {"margin": 1.0, "normalize": False, "distance": "squared_euclidean", "half": True}
    compare(single({"name": TRIPLET, **options}), vectors(3), layer)


@pytest.mark.parametrize("legacy", [False, True])
def test_given_contrastive_is_caffes(legacy: bool) -> None:
    y = (torch.arange(20) % 3 == 0).double()
    a, b = (v * 0.2 for v in vectors(2))  # some pairs within the margin
    objective = single({"name": CONTRASTIVE, "half": True, "legacy": legacy, "normalize": False})

    def layer(a: Tensor, b: Tensor) -> Tensor:
        squared = ((a - b) ** 2).sum(1)
        far = (1 - squared).clamp_min(0) if legacy else (1 - squared.sqrt()).clamp_min(0) ** 2
        return (y * squared + (1 - y) * far).sum() / (2 * len(a))

    compare(objective, [a, b], layer, y.long())


def test_given_contrastive_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.6, 0.8]])
    record, view = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    for options, expected in (({"power": 2}, (25 + 4) / 2), ({"power": 1}, (5 + 2) / 2), ({"weight": [2, 0.5]}, (50 + 2) / 2)):
        objective = single({"name": CONTRASTIVE, "margin": 3.0, "normalize": False, **options})
        value, _ = objective(x, record, record=record, view=view, match=torch.tensor([1, 0]))
        assert float(value) == pytest.approx(expected, rel=1e-6)


def test_cosine_embedding_is_torchs() -> None:
    y = torch.arange(20) % 2
    objective = single({"name": "cosine_embedding", "margin": 0.1, "normalize": False})
    compare(objective, vectors(2), lambda a, b: F.cosine_embedding_loss(a, b, 2 * y - 1, margin=0.1), y, rtol=1e-9)


def test_margin_ranking_is_torchs_on_similarities() -> None:
    y = torch.arange(20) % 2
    objective = single({"name": "margin_ranking", "normalize": False})
    compare(objective, vectors(3), lambda a, u, v: F.margin_ranking_loss((a * u).sum(1), (a * v).sum(1), 2 * y - 1), y)


@pytest.mark.parametrize("kind", ["mse", "sigmoid_ce"])
def test_regress_is_torchs(kind: str) -> None:
    x, target = torch.rand(2, 9, 4, dtype=torch.float64)
    value, _ = single({"name": "regress", "kind": kind, "normalize": False})(x, torch.arange(9), target=target)
    expected = F.mse_loss(x, target) if kind == "mse" else F.binary_cross_entropy_with_logits(x, target)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("kind", ["similarity", "neighbours"])
def test_distillation_in_chunks_is_the_whole_matrix(kind: str) -> None:
    x, target = torch.randn(30, 4, dtype=torch.float64).requires_grad_(), torch.randn(30, 9, dtype=torch.float64)
    objective = single({"name": "distill", "kind": kind, "temperature": 0.2, "chunk_bytes": 5000})
    value, _ = objective(x, torch.arange(30), target=target)
    (grad,) = torch.autograd.grad(value, x)
    s, t = (F.normalize(m) @ F.normalize(m).T for m in (x, target))
    same = torch.eye(30, dtype=torch.bool)
    p, q = ((m / 0.2).masked_fill(same, -1e9).log_softmax(1) for m in (s, t))
    divergence = F.kl_div(p, q, log_target=True, reduction="batchmean")
    expected = (s - t)[~same].square().mean() if kind == "similarity" else divergence
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0], rtol=1e-9, atol=1e-13)


def head(options: dict[str, Any]) -> tuple[Objective, Tensor, Tensor, Tensor]:
    """Objective, its centres, vectors and classes."""
    torch.manual_seed(2)
    objective = single({"dim": 6, "num_classes": 10, **options}).double()
    x = torch.randn(40, 6, dtype=torch.float64).requires_grad_()
    return objective, objective.get_parameter("loss.weight"), x, torch.randint(0, 8, (40,))


def equal(objective: Objective, x: Tensor, label: Tensor, weight: Tensor, expected: Tensor, theirs: Tensor) -> None:
    """Our value and gradients are `expected` and its gradients by x and by `theirs`, the same centres, maybe transposed."""
    value, _ = objective(x, label)
    grads = torch.autograd.grad(value, [x, weight])
    wanted = torch.autograd.grad(expected, [x, theirs])
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(grads[0], wanted[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grads[1], wanted[1].T if theirs.shape != weight.shape else wanted[1], rtol=1e-6, atol=1e-9)


def test_softmax_is_torchs_cross_entropy_of_a_linear_layer() -> None:
    objective, weight, x, label = head({"name": "softmax", "normalize": False})
    bias = objective.get_parameter("loss.bias").data.normal_()
    equal(objective, x, label, weight, F.cross_entropy(F.linear(x, weight, bias), label), weight)


@pytest.mark.parametrize("sub_centers", [1, 3])
def test_arcface_is_that_of_pytorch_metric_learning(sub_centers: int) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    objective, weight, x, label = head({"name": "arcface", "margin": 0.5, "scale": 16.0, "sub_centers": sub_centers})
    options = {"num_classes": 10, "embedding_size": 6, "margin": 0.5 * 180 / torch.pi, "scale": 16.0}
    more = {} if sub_centers == 1 else {"sub_centers": sub_centers}
    reference = (losses.SubCenterArcFaceLoss if more else losses.ArcFaceLoss)(**options, **more)
    reference.W.data = weight.detach().T.clone()
    equal(objective, x, label, weight, reference(x, label), reference.W)


def test_proxy_anchor_is_that_of_pytorch_metric_learning() -> None:
    objective, weight, x, label = head({"name": "proxy_anchor"})
    reference = pytest.importorskip("pytorch_metric_learning.losses").ProxyAnchorLoss(
        num_classes=10, embedding_size=6, margin=0.1, alpha=32
    )
    reference.proxies.data = weight.detach().clone()
    equal(objective, x, label, weight, reference(x, label), reference.proxies)


def test_class_sizes_set_the_margins() -> None:
    objective = single({"name": "arcface", "num_classes": 3, "dim": 4, "margin": 0.5, "margin_min": 0.05})
    loss = objective.loss
    assert isinstance(loss, Centres)
    loss.set_classes(torch.tensor([70, 50, 60]), torch.tensor([1, 256, 16]))  # n^(-1/4): 1, 1/4, 1/2
    assert loss.classes.tolist() == [50, 60, 70]
    assert objective.get_buffer("loss.margins").tolist() == pytest.approx([0.05, 0.05 + 0.45 / 3, 0.5], rel=1e-6)


def test_a_slice_of_the_centres_is_drawn_as_in_the_whole() -> None:
    whole = _draw((0, 2 * BLOCK + 50), 3, seed=9)
    for first, end in ((0, 10), (BLOCK - 5, BLOCK + 5), (BLOCK, 2 * BLOCK), (30, 2 * BLOCK + 50), (7, 7), (0, 0)):
        assert torch.equal(_draw((first, end), 3, seed=9), whole[first:end])


def test_rows_of_unknown_groups_are_left_out() -> None:
    objective, _, x, label = head({"name": "softmax"})
    stranger = label.clone()
    stranger[::2] = 12345
    (value, stats), (expected, _) = objective(x, stranger), objective(x[1::2], label[1::2])
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float(stats["num_terms"]) == 20


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "softmax", "num_classes": 1, "dim": 4}, "no image of this batch belongs to one of the 1 classes"),
        ({"name": "arcface", "num_classes": 3, "dim": 3}, "centres of 3 numbers cannot meet vectors of 4"),
        ({"name": "cosine_embedding"}, "compares given pairs"),
        ({"name": TRIPLET}, "compares given triplets"),
        ({"name": "distill"}, "distill needs a target"),
        ({"name": "regress"}, "the target has 5 numbers a row, the vectors have 4"),
        ({"name": CONTRASTIVE, "legacy": True, "power": 1}, r"loss\.legacy"),
        ({"name": TRIPLET, "p": 1.0, "distance": "cosine"}, r"loss\.p: only for distance euclidean"),
    ],
)
def test_mistakes_are_named(loss: dict[str, Any], message: str) -> None:
    target = None if "needs" in message else torch.randn(6, 5)
    with pytest.raises(ValueError, match=message):
        single(loss)(torch.randn(6, 4), torch.arange(6) + 1, target=target)


def test_classes_that_do_not_fit_are_named() -> None:
    loss = single({"name": "arcface", "num_classes": 3, "dim": 4, "margin_min": 0.1}).loss
    assert isinstance(loss, Centres)
    with pytest.raises(ValueError, match="need the classes' counts"):
        loss.set_classes(torch.arange(3))
    with pytest.raises(ValueError, match="expected 3 different groups, got 2"):
        loss.set_classes(torch.tensor([1, 1, 2]))
