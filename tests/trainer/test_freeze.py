"""What is frozen stays, what is not learns, and recomputing blocks changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Encoder
from trainer.encoders import build_encoder
from trainer.encoders.freeze import depends_on_batch, freeze, freeze_batchnorm, freeze_unused
from trainer.encoders.stages import stage_numbers


def convnet(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    part = {"name": "convnet", "dim": 4, "patch": 2, "widths": [8, 16], "blocks": 1, "grid": 1, **options}
    return build_encoder(Encoder.model_validate(part), 16)


def gradients(encoder: nn.Module) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    images, wanted = torch.rand(6, 3, 16, 16), torch.randn(6, 4)
    (encoder.train()(images) * wanted).sum().backward()
    return {name: p.grad for name, p in encoder.named_parameters()}


@pytest.mark.parametrize("what", [2, ["body.0", "body.1"]])
def test_frozen_stages_get_no_gradient_and_the_others_the_same_as_before(what: int | list[str]) -> None:
    free, frozen = gradients(convnet()), gradients(convnet(freeze=what))
    assert {name for name, grad in frozen.items() if grad is None} == {n for n in free if n.startswith(("body.0", "body.1."))}
    for name, grad in frozen.items():
        if grad is not None:
            assert torch.equal(grad, free[name])  # type: ignore[arg-type]


def test_checkpointing_gives_the_same_gradients_and_keeps_less() -> None:
    def kept(encoder: nn.Module) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            encoder.train()(torch.rand(2, 3, 16, 16))
        return sum(sizes)

    plain, again = gradients(convnet()), gradients(convnet(checkpointing=True))
    assert all(torch.equal(plain[name], again[name]) for name in plain)  # type: ignore[arg-type]
    assert kept(convnet(checkpointing=True)) < kept(convnet())


@pytest.mark.parametrize("what", [7, ["body.9"], ["bod"]])
def test_what_is_not_there_cannot_be_frozen(what: int | list[str]) -> None:
    with pytest.raises(ValueError, match=r"encoder\.freeze"):
        convnet(freeze=what)


def test_a_frozen_encoder_without_a_head_has_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="nothing of the encoder is left"):
        convnet(freeze=["body", "head"])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.spare = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.last(self.norm(self.first(images)).mean((2, 3)))
        return found


@pytest.mark.parametrize("how", ["all", "prefix"])
def test_frozen_batchnorm_keeps_its_statistics_in_training_and_in_copies(how: str) -> None:
    encoder = Normed()
    before = copy.deepcopy(encoder.eval().state_dict())
    freeze_batchnorm(encoder) if how == "all" else freeze(encoder, ["norm"])
    assert not any(depends_on_batch(part) for part in encoder.modules())
    for module in (encoder, copy.deepcopy(encoder)):
        one = module.train()(torch.full((1, 3, 2, 2), 0.3))
        many = module(torch.cat([torch.full((1, 3, 2, 2), 0.3), torch.rand(5, 3, 2, 2)]))
        torch.testing.assert_close(one, many[:1])
        assert list(module.state_dict()) == list(before)
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
        assert module.last.training
        assert not any(p.requires_grad for p in module.norm.parameters())


def test_weights_that_no_vector_depends_on_do_not_learn() -> None:
    encoder = Normed()
    freeze_unused(encoder, 4)
    assert {name for name, p in encoder.named_parameters() if not p.requires_grad} == {"spare.weight", "spare.bias"}
    assert encoder.training


def test_stages_cover_the_encoder_from_the_input_on() -> None:
    stages = stage_numbers(convnet())
    assert (stages["body.0.weight"], stages["body.1.body.0.weight"], stages["head.1.weight"]) == (0, 1, max(stages.values()))
