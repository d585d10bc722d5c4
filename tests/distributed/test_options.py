"""Guards, memory, momentum keys, prefixes, sums and the bf16 wire: the same on any number of ranks as in loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from trainer import collectives
from trainer.objective import build_objective

T, N = 0.3, 24
Dropped = Callable[[int, int], bool]


def batch(step: int) -> dict[str, Tensor]:
    """24 rows of 7 classes with two invalid rows, and everything that may come along."""
    g = torch.Generator().manual_seed(100 + step)
    group = torch.randint(0, 7, (N,), generator=g)
    valid = torch.ones(N, dtype=torch.bool)
    valid[[3, 17]] = False
    uid = torch.randperm(40, generator=g)[:N] + 40 * (step % 2)  # images come back two steps later
    x, keys, target = (torch.randn(N, d, generator=g, dtype=torch.float64) for d in (6, 6, 4))
    return {"x": x, "group": group, "uid": uid, "valid": valid, "keys": keys, "target": target}


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def loops(
    queries: dict[str, Tensor], candidates: dict[str, Tensor], *, same_rows: bool, dropped: Dropped = lambda q, c: False
) -> Tensor:
    """InfoNCE term by term; candidates [C] may go on behind the queries' own rows."""
    terms = []
    v, w = queries["v"], candidates["v"]
    for q in range(len(v)):
        if not queries["valid"][q]:
            continue
        other = [c for c in range(len(w)) if candidates["valid"][c] and candidates["uid"][c] != queries["uid"][q]]
        positives = [c for c in other if candidates["group"][c] == queries["group"][q]]
        negatives = [c for c in other if candidates["group"][c] != queries["group"][q] and not dropped(q, c)]
        for p in positives:
            logits = torch.stack([v[q] @ w[p], *(v[q] @ w[n] for n in negatives)]) / T
            terms.append(logits.logsumexp(0) - logits[0])
    assert same_rows == (len(v) == len(w))
    return torch.stack(terms).mean()


def run(options: dict[str, Any], steps: int, *, keys: bool = False, target: bool = False) -> list[tuple[float, Tensor, Any]]:
    """Value, this rank's gradient and the state after each step."""
    objective = build_objective({"name": "info_nce", "temperature": T, "chunk_bytes": 5000, **options}).double()
    borders = {1: [0, 24], 2: [0, 7, 24], 3: [0, 1, 15, 24]}[collectives.world()]
    part = slice(borders[collectives.rank()], borders[collectives.rank() + 1])
    found = []
    for step in range(steps):
        local = {k: t[part] for k, t in batch(step).items()}
        x = local["x"].clone().requires_grad_()
        extra = {**({"keys": local["keys"]} if keys else {}), **({"target": local["target"]} if target else {})}
        value, _ = objective(x, local["group"], uid=local["uid"], valid=local["valid"], step=step, **extra)
        value.backward()
        assert x.grad is not None
        found.append((float(value.detach()), x.grad / collectives.world(), copy.deepcopy(objective.state_dict())))
    return found


def every_case() -> dict[str, list[tuple[float, Tensor, Any]]]:
    return {
        "ignore_above": run({"ignore_above": 0.2}, 1),
        "ignore_above_ratio": run({"ignore_above_ratio": 0.5}, 1),
        "ignore_closer_than": run({"ignore_closer_than": 0.8}, 1, target=True),
        "memory": run({"memory": 50, "memory_start": 2}, 5),
        "keys": run({}, 1, keys=True),
        "keys and memory": run({"memory": 30}, 3, keys=True),
        "matryoshka": run({"matryoshka": [2, 6, 4]}, 1),
        "bf16": run({"wire": "bf16"}, 1),
    }


def expected(case: str) -> list[tuple[float, Tensor]]:
    found = []
    past = {"v": torch.zeros(0, 6, dtype=torch.float64), **{k: torch.zeros(0).long() for k in ("group", "uid", "valid")}}
    for step in range({"memory": 5, "keys and memory": 3}.get(case, 1)):
        b = batch(step)
        x = b["x"].clone().requires_grad_()
        v, size = unit(x), 50 if case == "memory" else 30
        own = {k: b[k] for k in ("group", "uid", "valid")}
        w = unit(b["keys"]) if "keys" in case else v
        if case == "bf16":
            w = v + (v.detach().bfloat16().double() - v.detach())  # rounded, gradient straight through
        dropped: Dropped = lambda q, c: False  # noqa: E731
        if case == "ignore_above":
            dropped = lambda q, c, v=v: bool(v[q] @ v[c] > 0.2)  # type: ignore[misc]  # noqa: E731
        elif case == "ignore_closer_than":
            t = unit(b["target"])
            dropped = lambda q, c, t=t: bool(1 - t[q] @ t[c] < 0.8)  # type: ignore[misc]  # noqa: E731
        elif case == "ignore_above_ratio":
            dropped = lambda q, c, v=v, b=b: _above_share(v, b, q, c)  # type: ignore[misc]  # noqa: E731
        if case == "matryoshka":
            parts = [unit(x[:, :d]) for d in (2, 4, 6)]
            value = sum((loops({"v": p, **own}, {"v": p, **own}, same_rows=True) for p in parts), torch.zeros(()))
        else:
            use = past if "memory" in case and step >= (2 if case == "memory" else 0) else None
            joined = {"v": w, **own} if use is None else {k: torch.cat([t, use[k]]) for k, t in {"v": w, **own}.items()}
            same = use is None or not len(use["uid"])
            value = loops({"v": v, **own}, joined, same_rows=same, dropped=dropped)
        value.backward()
        assert x.grad is not None
        found.append((float(value.detach()), x.grad))
        order = b["uid"].argsort()
        order = order[b["valid"][order]]
        now = {"v": w.detach()[order], **{k: t[order] for k, t in own.items()}}
        past = {k: torch.cat([past[k], t])[-size:] for k, t in now.items()}
    return found


def _above_share(v: Tensor, b: dict[str, Tensor], q: int, c: int) -> bool:
    near = [v[q] @ v[p] for p in range(N) if p != q and b["valid"][p] and b["group"][p] == b["group"][q]]
    return bool(near) and bool(v[q] @ v[c] > 0.5 * max(near))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_options_equal_the_loops_on_any_number_of_ranks(world: int) -> None:
    ranks = run_ranks(world, every_case) if world > 1 else [every_case()]
    for case in ranks[0]:
        for step, (value, grad) in enumerate(expected(case)):
            # A gradient that passes the wire's rounding is the unrounded one of the queries and of the candidates.
            tolerance = 1e-9
            assert [rank[case][step][0] for rank in ranks] == pytest.approx([value] * world, rel=tolerance), (case, step)
            joined = torch.cat([rank[case][step][1] for rank in ranks])
            error = float((joined - grad).norm() / grad.norm())
            assert error < 1e-8, f"{case}, step {step}: relative error {error:.1e}"


def test_the_memory_is_the_same_for_any_number_of_ranks_and_comes_back_from_a_checkpoint() -> None:
    one, two = [every_case()], run_ranks(2, every_case)
    for rank in two:
        for key, tensor in one[0]["memory"][-1][2].items():
            torch.testing.assert_close(rank["memory"][-1][2][key], tensor, rtol=1e-12, atol=1e-14)
    whole = run({"memory": 50, "memory_start": 2}, 5)
    fresh = build_objective({"name": "info_nce", "temperature": T, "memory": 50, "memory_start": 2}).double()
    fresh.load_state_dict(whole[3][2])
    b = batch(4)
    x = b["x"].clone().requires_grad_()
    value, _ = fresh(x, b["group"], uid=b["uid"], valid=b["valid"], step=4)
    value.backward()
    assert float(value.detach()) == pytest.approx(whole[4][0], rel=1e-13)
    torch.testing.assert_close(x.grad, whole[4][1], rtol=1e-10, atol=1e-14)


def test_a_weighted_sum_is_the_sum_of_its_parts() -> None:
    b = batch(0)
    parts = [{"name": "sup_con", "weight": 0.5}, {"name": "triplet", "miner": "batch_hard", "weight": 2}, {"name": "sup_con"}]
    x = b["x"].clone().requires_grad_()
    value, stats = build_objective(parts)(x, b["group"], uid=b["uid"], valid=b["valid"])
    value.backward()
    y = b["x"].clone().requires_grad_()
    singles = [build_objective({k: v for k, v in p.items() if k != "weight"}) for p in parts]
    total = sum(
        float(p.get("weight", 1)) * o(y, b["group"], uid=b["uid"], valid=b["valid"])[0]
        for p, o in zip(parts, singles, strict=True)
    )
    assert isinstance(total, Tensor)
    total.backward()
    assert float(value.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    torch.testing.assert_close(x.grad, y.grad)
    assert {"sup_con_0/loss", "triplet/loss", "sup_con_2/loss", "triplet/active_fraction"} <= set(stats)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ([], "empty list"),
        ({"name": "info_nce", "memory": 9, "matryoshka": [2]}, "matryoshka"),
        ({"name": "info_nce", "memory": -1}, "memory"),
        ({"name": "info_nce", "memory": 9, "ignore_closer_than": 0.1}, "ignore_closer_than"),
        ({"name": "info_nce", "matryoshka": [4, 4]}, "matryoshka"),
    ],
)
def test_options_that_cannot_be_joined_are_refused(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(loss)
