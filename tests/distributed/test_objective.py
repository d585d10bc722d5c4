"""Every loss on any number of real gloo ranks equals slow loops in one process, in value and in every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from tests.trainer import oracle, oracle_batch
from trainer import collectives
from trainer.objective import build_objective

DISTANCES = ["euclidean", "squared_euclidean", "cosine"]
BALANCES = ["none", "sample", "hardest"]
TRIPLETS: list[dict[str, Any]] = [
    *(
        {"miner": m, "distance": d, "soft": soft}
        for m in ("batch_hard", "semi_hard")
        for d in DISTANCES
        for soft in (False, True)
    ),
    *({"miner": m, "distance": d} for m in ("all", "semi_hard_within_margin", "hardest", "random_hard") for d in DISTANCES),
    {"miner": "all", "soft": True},
    {"miner": "all", "mean_over": "all", "pairs": "unordered", "distance": "squared_euclidean"},
    {"miner": "semi_hard_within_margin", "pick": "random", "pairs": "unordered"},
    {"miner": "hardest", "pairs": "unordered"},
    {"miner": "random_hard", "pairs": "unordered", "mean_over": "active", "soft": True},
    *({"miner": "distance_weighted", "distance": d} for d in DISTANCES),
]
CONTRASTIVE: list[dict[str, Any]] = [
    *({"distance": d, "power": power, "balance": b} for d, power, b in zip(DISTANCES, (1, 2, 2), BALANCES, strict=True)),
    {"half": True, "balance": "hardest", "weight": (0.7, 1.3)},
    {"legacy": True},
]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("circle", {"margin": 0.25, "scale": 32.0}),
    *(("contrastive", {"margin": 1.1, "distance": "euclidean", **options}) for options in CONTRASTIVE),
    ("info_nce", {"temperature": 0.2}),
    ("info_nce", {"temperature": 0.3, "decoupled": True}),
    ("info_nce", {"temperature": 0.2, "learnable": True}),
    *(("lifted_structure", {"margin": 1.0, "distance": distance}) for distance in DISTANCES),
    *(("margin", {"margin": 0.2, "miner": "all", "distance": distance}) for distance in DISTANCES),
    ("margin", {"margin": 0.2, "miner": "distance_weighted", "distance": "euclidean"}),
    *(("max_margin", {"margin": 0.3, "over": over}) for over in ("sum", "hardest")),
    ("multi_similarity", {"alpha": 2.0, "beta": 20.0, "base": 0.5, "epsilon": 0.1}),
    ("recall_at_k", {"k": [1, 2, 4, 16], "anneal": 0.1, "temperature": 1.0}),
    ("sigmoid", {}),
    ("sup_con", {"temperature": 0.1}),
    ("sup_con", {"temperature": 0.1, "learnable": True}),
    *(("triplet", {"margin": 0.3, "distance": "euclidean", **options}) for options in TRIPLETS),
]
TEMPERED = ("info_nce", "sup_con", "circle", "sigmoid")  # of raw vectors their exponentials say little


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


def objectives() -> Iterator[tuple[str, dict[str, Any], bool, nn.Module]]:
    for (name, options), normalize in itertools.product(CASES, [True, False]):
        if normalize or name not in TEMPERED or not options.get("learnable"):
            yield (
                name,
                options,
                normalize,
                build_objective({"name": name, "normalize": normalize, "chunk_bytes": 9000, **options}).double(),
            )


def every_case() -> list[tuple[float, Tensor, dict[str, Tensor]]]:
    """Value, gradient of this rank's rows and of the loss parameters, for each case."""
    x, ids = global_batch()
    border = cuts(collectives.world())
    part = slice(border[collectives.rank()], border[collectives.rank() + 1])
    found = []
    for _, _, _, objective in objectives():
        mine = x[part].clone().requires_grad_()
        local = {k: v[part].clone() for k, v in ids.items()}
        local["record"] -= local["record"].min()
        value, _ = objective(mine, local.pop("group"), **local, step=oracle_batch.STEP)
        value.backward()
        found.append((float(value.detach()), mine.grad / collectives.world(), _gradients(objective)))
    return found


def _gradients(objective: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in objective.named_parameters() if p.grad is not None}


def oracle_cases() -> list[tuple[str, float, Tensor, dict[str, Tensor]]]:
    expected = []
    x, ids = global_batch()
    for name, options, normalize, objective in objectives():
        leaf = x.clone().requires_grad_()
        learned = {k: p.detach().clone().requires_grad_() for k, p in objective.named_parameters()}
        value = oracle.loss(name, leaf, ids, options, normalize, {k.removeprefix("loss."): p for k, p in learned.items()})
        value.backward()
        title = f"{name} {options} normalize={normalize}"
        expected.append((title, float(value.detach()), leaf.grad, {k: p.grad for k, p in learned.items()}))
    return expected


@pytest.fixture(scope="module")
def expected() -> list[tuple[str, float, Tensor, dict[str, Tensor]]]:
    return oracle_cases()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_gives_the_value_and_gradients_of_the_loops(world: int, expected: Any) -> None:
    ranks = run_ranks(world, every_case) if world > 1 else [every_case()]
    wrong = []
    for case, (title, value, grad, learned) in enumerate(expected):
        assert value, f"{title}: tells nothing"
        joined = torch.cat([rank[case][1] for rank in ranks])
        errors = [float((joined - grad).norm() / grad.norm())]
        errors += [float((rank[case][2][k] - g).norm() / g.norm()) for rank in ranks for k, g in learned.items()]
        if any(rank[case][0] != pytest.approx(value, rel=1e-10) for rank in ranks) or max(errors) > 1e-8:
            wrong.append(f"{title}: value {ranks[0][case][0]} for {value}, gradients off by {max(errors):.1e}")
    assert not wrong, "\n".join(wrong)
