"""Every loss on any number of real gloo ranks equals slow loops in one process, in value and in every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.trainer import oracle
from trainer import collectives
from trainer.objective import build_objective

DISTANCES = ["euclidean", "squared_euclidean", "cosine"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("info_nce", {"temperature": 0.2}),
    ("info_nce", {"temperature": 0.3, "decoupled": True}),
    ("sup_con", {"temperature": 0.1}),
    *(
        ("triplet", {"margin": 0.3, "miner": miner, "distance": distance, "soft": soft})
        for miner, distance, soft in itertools.product(["batch_hard", "semi_hard"], DISTANCES, [False, True])
    ),
]


def global_batch() -> tuple[Tensor, dict[str, Tensor]]:
    """36 rows of uneven classes: lonely anchors, invalid rows, duplicate images, pairs and explicit negatives."""
    generator = torch.Generator().manual_seed(3)
    n = 36
    x = torch.randn(n, 7, generator=generator, dtype=torch.float64)
    group = torch.tensor([0] * 9 + [1] * 6 + [2] * 5 + [3, 4, 5] + [6] * 7 + [7] * 6)[:n]
    uid = torch.randperm(n, generator=generator) * 1000 + 17
    view = torch.zeros(n, dtype=torch.int64)
    record = torch.arange(n)
    record[24:36:2], record[25:36:2] = torch.arange(6) + 24, torch.arange(6) + 24
    view[25:36:2] = 1
    record[20], record[21], record[22], view[21], view[22] = 20, 20, 20, 1, 2  # a triplet with an explicit negative
    group[21] = group[20]
    uid[27] = uid[26]  # two augmented views of one image: a positive
    uid[5] = uid[2]  # the same image twice by accident: neither
    uid[10] = uid[30]  # the same image under two classes: never its own negative
    x[5], x[27], x[10] = x[2], x[26], x[30]
    valid = torch.ones(n, dtype=torch.bool)
    valid[[4, 16, 33]] = False
    return x, {"group": group, "uid": uid, "view": view, "record": record, "valid": valid}


def cuts(world: int) -> list[int]:
    """Uneven slice borders that split no record."""
    return {1: [0, 36], 2: [0, 12, 36], 3: [0, 5, 24, 36], 4: [0, 3, 20, 30, 36]}[world]


def every_case() -> list[tuple[float, Tensor, dict[str, Tensor]]]:
    """Value, gradient of this rank's rows and of the loss parameters, for each case."""
    x, ids = global_batch()
    border = cuts(collectives.world())
    part = slice(border[collectives.rank()], border[collectives.rank() + 1])
    found = []
    for (name, options), normalize, learnable in itertools.product(CASES, [True, False], [False, True]):
        if learnable and (name == "triplet" or not normalize):
            continue
        extra = {"learnable": True} if learnable else {}
        objective = build_objective({"name": name, "normalize": normalize, "chunk_bytes": 9000, **options, **extra}).double()
        mine = x[part].clone().requires_grad_()
        local = {k: v[part].clone() for k, v in ids.items()}
        local["record"] -= local["record"].min()
        value, _ = objective(mine, local.pop("group"), **local)
        value.backward()
        grads = {k: p.grad for k, p in objective.named_parameters()}
        found.append((float(value.detach()), mine.grad / collectives.world(), grads))
    return found


def oracle_cases() -> list[tuple[float, Tensor, Tensor | None]]:
    expected: list[tuple[float, Tensor, Tensor | None]] = []
    x, ids = global_batch()
    for (name, options), normalize, learnable in itertools.product(CASES, [True, False], [False, True]):
        if learnable and (name == "triplet" or not normalize):
            continue
        leaf = x.clone().requires_grad_()
        options = dict(options)
        log_scale = None
        if learnable:
            log_scale = -torch.tensor(options["temperature"], dtype=torch.float64).log().detach()
            log_scale = log_scale.float().double().requires_grad_()  # the parameter is made in float32
            options["temperature"] = (-log_scale).exp()
        value = oracle.loss(name, leaf, ids, options, normalize)
        value.backward()
        expected.append((float(value.detach()), leaf.grad, None if log_scale is None else log_scale.grad))
    return expected


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, Tensor, Tensor | None]]:
    return oracle_cases()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_gives_the_value_and_gradients_of_the_loops(world: int, expected: Any) -> None:
    ranks = run_ranks(world, every_case) if world > 1 else [every_case()]
    for case, (value, grad, scale_grad) in enumerate(expected):
        for rank in ranks:
            assert rank[case][0] == pytest.approx(value, rel=1e-10)
            if scale_grad is not None:
                assert float(rank[case][2]["loss.scale.log_scale"]) == pytest.approx(float(scale_grad), rel=1e-8)
        joined = torch.cat([rank[case][1] for rank in ranks])
        error = (joined - grad).norm() / grad.norm().clamp_min(1e-30)
        assert error < 1e-8, f"case {case}: relative error {error:.2e}"
