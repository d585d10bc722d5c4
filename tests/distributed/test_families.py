"""Losses of given records, targets and class centres: on any number of real gloo ranks equal to loops in one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.trainer import oracle_given as oracle
from trainer import collectives
from trainer.centres import Centres
from trainer.objective import Objective, build_objective

CONTRASTIVE, TRIPLET = "trainer.losses.given:GivenContrastive", "trainer.losses.given:GivenTriplet"
DISTANCES = ["euclidean", "squared_euclidean", "cosine"]
GIVEN: list[tuple[str, dict[str, Any]]] = [
    *((CONTRASTIVE, {"margin": 0.9, "distance": d, "power": p}) for d, p in itertools.product(DISTANCES, [1, 2])),
    (CONTRASTIVE, {"margin": 1.1, "distance": "euclidean", "half": True, "weight": [1.0, 0.3]}),
    (CONTRASTIVE, {"margin": 1.1, "distance": "euclidean", "legacy": True}),
    *((TRIPLET, {"margin": 0.4, "distance": d, "swap": s}) for d, s in itertools.product(DISTANCES, [False, True])),
    (TRIPLET, {"margin": 0.4, "distance": "euclidean", "p": 3.0, "eps": 1e-3}),
    (TRIPLET, {"margin": 0.4, "distance": "squared_euclidean", "half": True}),
    (TRIPLET, {"margin": 0.0, "distance": "euclidean", "soft": True}),
    ("cosine_embedding", {"margin": 0.2}),
    ("margin_ranking", {"margin": 0.1}),
]
TARGETS: list[tuple[str, dict[str, Any]]] = [
    *(("regress", {"kind": kind}) for kind in ("mse", "cosine", "sigmoid_ce")),
    *(("distill", {"kind": kind, "temperature": 0.3}) for kind in ("similarity", "neighbours", "vector")),
]
CENTRES: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {"num_classes": 7}),
    ("softmax", {"num_classes": 3}),  # a rank without classes
    ("arcface", {"num_classes": 7, "margin": 0.5, "scale": 10.0}),
    ("arcface", {"num_classes": 7, "margin": 2.5, "scale": 5.0}),  # many angles beyond pi - margin
    ("arcface", {"num_classes": 7, "margin": 0.6, "margin_min": 0.1, "scale": 10.0, "sub_centers": 3}),
    ("proxy_anchor", {"num_classes": 7, "margin": 0.1, "alpha": 6.0}),
    ("proxy_anchor", {"num_classes": 2, "margin": 0.1, "alpha": 32.0}),
]
DIM = 6


def global_batch() -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """12 records of views 0, 1 and 0 to 4 explicit negatives in any order, some not valid, some not matching."""
    generator = torch.Generator().manual_seed(4)
    views = [torch.randperm(2 + k % 5, generator=generator) for k in range(12)]
    record = torch.cat([torch.full((len(v),), r) for r, v in enumerate(views)])
    n = len(record)
    x = torch.randn(n, DIM, generator=generator, dtype=torch.float64)
    target = torch.rand(n, DIM, generator=generator, dtype=torch.float64)
    valid = torch.ones(n, dtype=torch.bool)
    valid[[3, 11, 12, 25]] = False
    ids = {
        "group": class_groups(9)[torch.randint(9, (n,), generator=generator)],  # more groups than classes
        "view": torch.cat(views),
        "record": record,
        "valid": valid,
        "match": torch.arange(12) % 3 % 2,
    }
    x[5] = x[6]  # a distance of 0 in a record, or between neighbours
    return x, ids, target


def class_groups(num: int) -> Tensor:
    """Groups are hashes, not places."""
    return (torch.arange(num) * 2654435761 + 12345) % 2**31 * 7**10


def local_part() -> tuple[slice, dict[str, Tensor]]:
    """This rank's rows, cut at records and unevenly, one rank of four with none; records numbered from 0."""
    _, ids, _ = global_batch()
    border = {1: [0, 12], 2: [0, 3, 12], 3: [0, 5, 6, 12], 4: [0, 4, 4, 9, 12]}[collectives.world()]
    first, end = border[collectives.rank()], border[collectives.rank() + 1]
    rows = ((ids["record"] >= first) & (ids["record"] < end)).nonzero()[:, 0]
    part = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)
    local = {k: v[part].clone() for k, v in ids.items() if k != "match"}
    return part, {**local, "record": local["record"] - first, "match": ids["match"][first:end]}


def build(name: str, options: dict[str, Any], **more: Any) -> Objective:
    """In float64, alike on every number of ranks, with a bias that is not 0 and classes that are not places."""
    torch.manual_seed(11)
    objective = build_objective({"name": name, "chunk_bytes": 2500, **options, **more}).double()
    assert isinstance(objective, Objective)
    loss = objective.loss
    if isinstance(loss, Centres):
        num = loss.num_classes
        loss.set_classes(class_groups(num).flip(0), torch.arange(1, num + 1).flip(0) ** 2)
        if loss.bias is not None:
            every = torch.linspace(-1, 1, num, dtype=torch.float64)
            loss.bias.data = every[slice(*loss._rows(collectives.rank()))] if loss.sharded else every
    return objective


def cases() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    given = [(*case, {"normalize": normalize}) for case in GIVEN for normalize in (True, False)]
    targets = [(*case, {"normalize": normalize}) for case in TARGETS for normalize in (True, False)]
    centres = [(name, {"dim": DIM, **options}, {"shard": shard}) for name, options in CENTRES for shard in (False, True)]
    return [*given, *targets, *centres]


def every_case() -> list[tuple[float, Tensor, dict[str, Tensor]]]:
    """Value, gradient of this rank's rows and whole gradients of the loss parameters, for each case."""
    x, _, target = global_batch()
    part, local = local_part()
    found = []
    for name, options, more in cases():
        objective = build(name, options, **more)
        mine = x[part].clone().requires_grad_()
        rest = {**local, "target": target[part]} if (name, options) in TARGETS else dict(local)
        value, stats = objective(mine, rest.pop("group"), **rest)
        value.backward()
        assert all(torch.isfinite(number) for number in stats.values())
        loss = objective.loss
        grads = {
            key: loss.gather_rows(p.grad) if isinstance(loss, Centres) and loss.sharded else p.grad
            for key, p in loss.named_parameters()
        }
        assert mine.grad is not None
        found.append((float(value.detach()), mine.grad / collectives.world(), grads))
    return found


def oracle_case(name: str, options: dict[str, Any], more: dict[str, Any]) -> tuple[float, Tensor, dict[str, Tensor]]:
    x, ids, target = global_batch()
    leaf = x.clone().requires_grad_()
    v = leaf / leaf.norm(dim=1, keepdim=True) if more.get("normalize", True) else leaf
    options = dict(options)
    parameters: dict[str, Tensor] = {}
    if (name, options) in TARGETS:
        value = getattr(oracle, name)(v, target, ids["valid"], **options)
    elif (name, options) in GIVEN:
        short = {CONTRASTIVE: "contrastive", TRIPLET: "triplet"}.get(name, name)
        if "p" in options:
            options["p_norm"] = options.pop("p")
        value = oracle.given(short, v, ids, **options)
    else:
        parameters = {k: p.detach().clone().requires_grad_() for k, p in build(name, options).loss.named_parameters()}
        value = oracle_centres(name, v, ids, parameters, options)
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad, {k: p.grad for k, p in parameters.items() if p.grad is not None}


def oracle_centres(
    name: str, x: Tensor, ids: dict[str, Tensor], parameters: dict[str, Tensor], options: dict[str, Any]
) -> Tensor:
    num = options["num_classes"]
    groups = sorted(class_groups(num).tolist())
    pairs = zip(ids["group"].tolist(), ids["valid"].tolist(), strict=True)
    labels = [groups.index(group) if valid and group in groups else None for group, valid in pairs]
    if name == "softmax":
        return oracle.softmax(x, labels, parameters["weight"], parameters["bias"])
    if name == "proxy_anchor":
        return oracle.proxy_anchor(x, labels, parameters["weight"], options["margin"], options["alpha"])
    counts = dict(zip(class_groups(num).tolist(), [k**2 for k in range(1, num + 1)], strict=True))
    sizes = [counts[group] ** -0.25 for group in groups]
    low = options.get("margin_min", options["margin"])
    margins = [low + (options["margin"] - low) * (s - min(sizes)) / (max(sizes) - min(sizes)) for s in sizes]
    return oracle.arcface(x, labels, parameters["weight"], margins, options["scale"], options.get("sub_centers", 1))


def train_and_save() -> dict[str, Tensor]:
    """One step of a sharded head, saved whole, changed, and loaded again."""
    x, _, _ = global_batch()
    part, local = local_part()
    objective = build("arcface", {"num_classes": 7, "dim": DIM, "sub_centers": 2, "shard": True})
    loss = objective.loss
    assert isinstance(loss, Centres)
    assert len(loss.weight) == 2 * len(range(*loss._borders(collectives.rank())))
    local.pop("match")
    objective(x[part].clone().requires_grad_(), local.pop("group"), **local)[0].backward()
    torch.optim.AdamW(objective.parameters(), lr=0.1).step()
    state = {key: whole.clone() for key, whole in loss.gather_state().items()}
    kept = loss.weight.detach().clone()
    with torch.no_grad():
        loss.weight.zero_()
    loss.load_full(state)
    assert torch.equal(loss.weight, kept)
    return state


def everything() -> tuple[Any, Any]:
    """In one start of the ranks, which is what takes the time."""
    return every_case(), train_and_save()


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, Tensor, dict[str, Tensor]]]:
    return [oracle_case(*case) for case in cases()]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_gives_the_value_and_gradients_of_the_loops(world: int, expected: Any) -> None:
    ranks, states = zip(*(run_ranks(world, everything) if world > 1 else [everything()]), strict=True)
    for case, (value, grad, grads), *found in zip(cases(), expected, *ranks, strict=True):
        joined = torch.cat([one[1] for one in found])
        assert (joined - grad).norm() / grad.norm().clamp_min(1e-30) < 1e-8, case
        for one in found:
            assert one[0] == pytest.approx(value, rel=1e-10), case
            assert one[2].keys() == grads.keys()
            for key, whole in grads.items():
                assert (one[2][key] - whole).norm() / whole.norm() < 1e-8, (case, key)
    alone = train_and_save()
    for state in states:  # a sharded head is saved whole, and is the same on any number of ranks
        for key, whole in alone.items():
            torch.testing.assert_close(state[key], whole, rtol=1e-9, atol=1e-12)


def test_vectors_shorter_than_the_centres_meet_their_first_numbers() -> None:
    x, ids, _ = global_batch()
    objective = build("arcface", {"num_classes": 7, "dim": DIM + 2, "scale": 3.0})
    value, _ = objective(x, ids["group"], valid=ids["valid"])
    weight = dict(objective.loss.named_parameters())["weight"][:, :DIM].detach()
    expected = oracle_centres("arcface", x, ids, {"weight": weight}, {"num_classes": 7, "margin": 0.5, "scale": 3.0}).detach()
    assert float(value.detach()) == pytest.approx(float(expected))
