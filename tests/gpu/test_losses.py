"""Every loss on a GPU against the same loss on the CPU, in value and in every gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs import registry
from tests.benchmarks.cases import batch, row_losses
from tests.distributed import test_families as families
from tests.distributed import test_objective as rows
from tests.gpu.card import CARD, CPU, needs_card
from tests.trainer.oracle_batch import STEP
from trainer.objective import build_objective

pytestmark = needs_card
ROWS = 512


@dataclass(frozen=True, slots=True)
class Case:
    """An objective and what it is called with, on the CPU in float64."""

    title: str
    objective: nn.Module
    x: Tensor
    about: dict[str, Tensor]


def small_cases() -> Iterator[Case]:
    """What the losses' own tests look at: many chunks, rows that are not valid, images that are there twice."""
    x, ids = rows.global_batch()
    for name, options, normalize, objective in rows.objectives():
        yield Case(f"{name} {options} normalize={normalize}", objective, x, ids)
    x, _, target = families.global_batch()
    _, ids = families.local_part()
    for name, options, more in families.cases():
        about = {**ids, "target": target} if (name, options) in families.TARGETS else ids
        yield Case(f"{name} {options} {more}", families.build(name, options, **more), x, about)


def large_cases() -> Iterator[Case]:
    """Losses over rows with their defaults, on vectors as training has them."""
    x, group = batch(ROWS, torch.float64)
    about = {"group": group, "view": (torch.arange(ROWS) % 4 > 0).long()}
    for title, loss in row_losses().items():
        yield Case(title, build_objective(loss).double(), x, about)


def computed(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[float, list[Tensor]]:
    """The value, and the gradients of the vectors and of what the loss learns, in float64 on the CPU."""
    objective = copy.deepcopy(case.objective).to(device, dtype)
    x = case.x.to(device, dtype, copy=True).requires_grad_()
    about: dict[str, Any] = {name: tensor.to(device) for name, tensor in case.about.items()}
    value, stats = objective(x, about.pop("group"), **about, step=STEP)
    value.backward()
    assert value.device.type == device.type
    assert all(torch.isfinite(number) for number in stats.values())
    grads = [t.grad for t in (x, *objective.parameters())]
    return float(value.detach()), [g.double().cpu() for g in grads if g is not None]


def differences(case: Case, dtype: torch.dtype) -> list[float]:
    """How far the GPU in `dtype` is from the CPU in float64, relative: the value, then the norm of every gradient."""
    (one, grads), (other, others) = computed(case, CPU, torch.float64), computed(case, CARD, dtype)
    assert len(grads) == len(others)
    pairs = zip(grads, others, strict=True)
    return [abs(other / one - 1), *(float((b - a).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs)]


def test_no_loss_is_left_out() -> None:
    short = {families.CONTRASTIVE: "contrastive", families.TRIPLET: "triplet"}
    tried = {name for name, _ in rows.CASES} | {short.get(name, name) for name, _, _ in families.cases()}
    assert tried == set(registry.PARTS["loss"])


def test_float64_is_that_of_the_cpu() -> None:
    found = {case.title: max(differences(case, torch.float64)) for case in small_cases()}
    print(f"\n{len(found)} losses, float64: relative difference at most {max(found.values()):.1e}")
    assert {title: worst for title, worst in found.items() if not worst < 1e-9} == {}


def test_float32_is_close() -> None:
    found = {case.title: max(differences(case, torch.float32)) for case in large_cases()}
    print(f"\n{len(found)} losses, float32: relative difference at most {max(found.values()):.1e}")
    assert {title: worst for title, worst in found.items() if not worst < 1e-3} == {}


def test_deterministic_kernels_do_for_every_loss_and_give_the_same_bits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    wrong = {}
    torch.use_deterministic_algorithms(True)
    try:
        for case in (*small_cases(), *large_cases()):
            try:
                one, two = (computed(case, CARD, torch.float32) for _ in range(2))
            except RuntimeError as error:
                wrong[case.title] = str(error).splitlines()[0]
                continue
            if one[0] != two[0] or not all(map(torch.equal, one[1], two[1])):
                wrong[case.title] = "other bits"
    finally:
        torch.use_deterministic_algorithms(False)
    assert wrong == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_of_16_bits_are_raised(dtype: torch.dtype) -> None:
    case = next(c for c in large_cases() if c.title == "sup_con")
    assert max(differences(case, torch.float32)) < 1e-4
    x = case.x.to(CARD, dtype).requires_grad_()
    value, _ = copy.deepcopy(case.objective).float().to(CARD)(x, case.about["group"].to(CARD))
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.isfinite(x.grad).all()
