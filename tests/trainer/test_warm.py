"""A warm start takes everything that is named alike, and leaves nothing out in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.warm import start_from


def net(width: int, *, extra: bool = False) -> nn.Module:
    parts = {"body": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, width)}
    return nn.ModuleDict({**parts, "tail": nn.Linear(1, 1)} if extra else parts)


def test_weights_and_statistics_are_taken_over() -> None:
    source, target = net(2), net(2)
    source["norm"].running_mean.fill_(5)  # type: ignore[index]
    start_from(target, source.state_dict())
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in target.state_dict().items())


def test_what_is_skipped_stays_as_drawn() -> None:
    source, target = net(2, extra=True), net(5)
    drawn = target.state_dict()["head.weight"].clone()
    start_from(target, source.state_dict(), skip=["head", "tail"])
    assert torch.equal(target.state_dict()["body.weight"], source.state_dict()["body.weight"])
    assert torch.equal(target.state_dict()["head.weight"], drawn)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (net(2), net(5), r"head\.weight: \[2, 4\] there, here \[5, 4\]"),
        (net(2, extra=True), net(2), r"tail\.weight: \[1, 1\] there, not here"),
        (net(2), net(2, extra=True), r"tail\.weight: not there, here \[1, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(source: nn.Module, target: nn.Module, words: str) -> None:
    before = {name: t.clone() for name, t in target.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        start_from(target, source.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())


def test_a_prefix_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder\.init_skip: no weights under 'haed'"):
        start_from(net(2), net(2).state_dict(), skip=["haed"])
