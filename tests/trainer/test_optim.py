"""Optimizers against their papers' equations in plain loops; what learns at which rate."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Optim
from trainer.optim import build_optimizer, set_rate
from trainer.schedules import learning_rate

Rule = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]  # w, g, m, weight decay -> w, m
LR = 0.1


def lion(w: Tensor, g: Tensor, m: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    update = torch.sign(0.9 * m + 0.1 * g)
    return w - LR * (update + decay * w), 0.99 * m + 0.01 * g


def lars(w: Tensor, g: Tensor, m: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    local = 0.001 * w.norm() / (g.norm() + decay * w.norm()) if decay else 1.0
    m = 0.9 * m + LR * local * (g + decay * w)
    return w - m, m


def sgd(w: Tensor, g: Tensor, m: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    m = 0.9 * m + g + decay * w
    return w - LR * m, m


@pytest.mark.parametrize(("name", "rule"), [("lion", lion), ("lars", lars), ("sgd", sgd)])
def test_an_optimizer_follows_its_equations(name: str, rule: Rule) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    optimizer = build_optimizer(Optim(name=name, lr=LR, weight_decay=0.3), [layer])
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in layer.parameters()]
    decays = [0.3 if p.ndim == 2 else 0.0 for p in layer.parameters()]
    for _ in range(4):
        grads = [torch.randn_like(p) for p in layer.parameters()]
        for p, grad in zip(layer.parameters(), grads, strict=True):
            p.grad = grad
        optimizer.step()
        expected = [rule(w, g, m, d) for (w, m), g, d in zip(expected, grads, decays, strict=True)]
    for p, (w, _) in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lars"])
def test_an_optimizer_goes_on_from_its_state(name: str) -> None:
    def steps(layer: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for p in layer.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    torch.manual_seed(0)
    layer, optim = nn.Linear(4, 3), Optim(name=name, lr=LR)
    optimizer = build_optimizer(optim, [layer])
    steps(layer, optimizer, 0, 3)
    weights, state = {k: v.clone() for k, v in layer.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    steps(layer, optimizer, 3, 6)
    again = nn.Linear(4, 3)
    again.load_state_dict(weights)
    resumed = build_optimizer(optim, [again])
    resumed.load_state_dict(state)
    steps(again, resumed, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


def test_the_rate_falls_after_each_milestone() -> None:
    optim = Optim(lr=2.0, warmup_steps=2, schedule="step", milestones=(4, 6), factor=0.5)
    assert [learning_rate(optim, step, 8) for step in range(1, 9)] == [1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.5]


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.token = nn.Parameter(torch.zeros(1, 2))
        self.undecayed = ["token"]


def test_earlier_stages_learn_slower_and_frozen_ones_are_left_out() -> None:
    encoder, loss = Stages(), nn.Linear(2, 2)
    encoder.block.requires_grad_(False)
    optimizer = build_optimizer(Optim(layer_decay=0.5), [encoder, loss])
    set_rate(optimizer, 8.0)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found[id(encoder.stem.weight)] == (1.0, 0.05)  # three stages after it: block, head, and what is in none
    assert found[id(encoder.head.weight)] == (4.0, 0.05)
    assert found[id(encoder.head.bias)] == (4.0, 0.0)
    assert found[id(encoder.token)] == (8.0, 0.0)
    assert found[id(loss.weight)] == (8.0, 0.05)
    assert len(found) == len([p for p in [*encoder.parameters(), *loss.parameters()] if p.requires_grad])
    faster = build_optimizer(Optim(layer_decay=0.5, loss_lr=100.0), [encoder, loss])
    set_rate(faster, 8.0)
    rates = {id(p): group["lr"] for group in faster.param_groups for p in group["params"]}
    assert rates[id(loss.weight)] == 800.0
    assert rates[id(encoder.head.weight)] == 4.0


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (Optim(momentum=0.5), "optim.momentum: optim 'adamw' has no such option"),
        (Optim(name="lars", nesterov=True), "optim.nesterov"),
        (Optim(name="sgd", nesterov=True, momentum=0.0), "optim.momentum must be above 0"),
        (Optim(name="adam"), "did you mean 'adamw'"),
    ],
)
def test_an_option_of_another_optimizer_is_refused(optim: Optim, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(optim, [nn.Linear(2, 2)])
