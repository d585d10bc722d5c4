"""Parts of a step on a GPU against the CPU: augmentation, optimizers, averages, copies for checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cluster.memory import out_of_memory
from configs.schema import Optim
from pipelines.augment import apply
from tests.gpu.card import CARD, CPU, needs_card
from tests.pipelines.test_augment import CONFIGS, images, some_draws
from trainer.checkpoints import Snapshot
from trainer.optim import Average, build_optimizer
from trainer.writer import HostCopy

pytestmark = needs_card


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_augmentation_is_that_of_the_cpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    pixels, drawn = images(64).contiguous(memory_format=torch.channels_last), some_draws(64)
    expected = apply(pixels, drawn, CONFIGS[name], dtype)
    found = apply(pixels.to(CARD), drawn.to(CARD), CONFIGS[name], dtype)
    assert found.device.type == "cuda"
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4)).double().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lars"])
def test_optimizer_and_average_go_the_way_of_the_cpu_and_go_on_over_there(name: str) -> None:
    ways = []
    for devices in ((CPU, CPU), (CARD, CARD), (CARD, CPU), (CPU, CARD)):
        encoder = network()
        optimizer, average = build_optimizer(Optim(name=name, lr=0.1), [encoder]), Average(encoder, 0.9)
        for half, device in enumerate(devices):
            weights, state = copy.deepcopy(encoder.state_dict()), copy.deepcopy(optimizer.state_dict())
            held = copy.deepcopy(average.module.state_dict())
            encoder = network().to(device)
            encoder.load_state_dict(weights)
            optimizer, average = build_optimizer(Optim(name=name, lr=0.1), [encoder]), Average(encoder, 0.9)
            average.module.load_state_dict(held)
            optimizer.load_state_dict(state)
            for step in range(4 * half + 1, 4 * half + 5):
                generator = torch.Generator().manual_seed(step)
                for p in encoder.parameters():
                    grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    p.grad = torch.empty_like(p).copy_(grad)
                optimizer.step()
                average.update(step)
        ways.append([p.detach().cpu() for p in (*encoder.parameters(), *average.module.parameters())])
    for way in ways[1:]:
        torch.testing.assert_close(way, ways[0], rtol=1e-10, atol=1e-12)


def test_a_checkpoint_is_copied_as_it_was() -> None:
    weights = {
        "w": torch.randn(8, 3, 3, 3, device=CARD).to(memory_format=torch.channels_last),
        "none": torch.zeros(0, 4).to(CARD),
    }
    taken = Snapshot(
        {"encoder": weights}, {"state": {0: {"step": torch.tensor(3.0, device=CARD)}}}, {"cpu": torch.get_rng_state()}
    )
    copied = HostCopy()(taken)
    expected = weights["w"].to(CPU, copy=True)
    weights["w"].zero_()
    assert torch.equal(copied.modules["encoder"]["w"], expected)
    assert copied.modules["encoder"]["w"].is_pinned()
    assert copied.optimizer["state"][0]["step"].device.type == "cpu"


def test_a_full_gpu_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**45, dtype=torch.uint8, device=CARD)
    assert out_of_memory(told.value)
