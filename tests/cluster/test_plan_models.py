"""The table of encoders against published numbers, and against the same architectures built from torch's own layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cluster import estimate
from cluster.plan.models import MODELS, ResNet, Vit, published

SLOW = pytest.mark.acceptance
# torchvision's documentation of its weights: parameters and GFLOPs (multiplications) with a head of 1000 classes.
PUBLISHED = {
    "vit-b16": (86_567_656, 17.56),
    "vit-b32": (88_224_232, 4.41),
    "vit-l16": (304_326_632, 61.55),
    "resnet50": (25_557_032, 4.09),
    "resnet101": (44_549_160, 7.80),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_those_that_are_published(name: str) -> None:
    parameters, gflops = PUBLISHED[name]
    facts = published(name, 224, 1000, "fp32")
    assert facts.parameters + 1000 == parameters  # the head's biases
    assert facts.forward_flops / 2e9 == pytest.approx(gflops, rel=0.01)


class Block(nn.Module):
    """A transformer's layer, in front of each half a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))
        y: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return y


class PlainVit(nn.Module):
    def __init__(self, shape: Vit, image_size: int) -> None:
        super().__init__()
        width, patches = shape.width, (image_size // shape.patch) ** 2
        self.patches = nn.Conv2d(3, width, shape.patch, stride=shape.patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        y: Tensor = self.norm(self.blocks(x))[:, 0]
        return y


class Bottleneck(nn.Module):
    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = [(into, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        self.steps = nn.ModuleList(nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in sizes)
        other = nn.Sequential(nn.Conv2d(into, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.aside: nn.Module = other if into != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (step, norm) in enumerate(zip(self.steps, self.norms, strict=True)):
            y = norm(step(y))
            y = F.relu(y, inplace=True) if i < 2 else y
        return F.relu_(y + self.aside(x))


def plain_resnet(shape: ResNet) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    into = 64
    for stage, count in enumerate(shape.blocks):
        for block in range(count):
            layers.append(Bottleneck(into, 64 * 2**stage, 2 if stage and not block else 1))
            into = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def plain_of(name: str, image_size: int) -> nn.Module:
    shape = MODELS[name]
    return PlainVit(shape, image_size) if isinstance(shape, Vit) else plain_resnet(shape)


@pytest.mark.parametrize(
    ("name", "image_size"),
    [("vit-s16", 224), ("vit-b32", 96), pytest.param("vit-l14", 224, marks=SLOW), ("resnet50", 224)],
)
def test_shapes_of_the_built_network_give_what_the_table_says(name: str, image_size: int) -> None:
    with torch.device("meta"):
        network = plain_of(name, image_size)
        images = torch.zeros(2, 3, image_size, image_size)
    facts = published(name, image_size, None, "fp32")
    assert sum(p.numel() for p in network.parameters()) == facts.parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    assert counter.get_total_flops() / 2 == pytest.approx(facts.forward_flops, rel=0.01)


@pytest.mark.parametrize(
    ("name", "device"), [("vit-s16", "cpu"), pytest.param("resnet50", "meta", marks=SLOW)]
)  # on meta attention is not fused
def test_autograd_keeps_what_the_table_says(name: str, device: str) -> None:
    with torch.device(device):
        network = plain_of(name, 224)
    kept = estimate._kept(network, 224, device, most=None)
    assert kept == pytest.approx(published(name, 224, None, "fp32").kept_bytes, rel=0.05)


@pytest.mark.parametrize("name", [pytest.param("vit-s16", marks=SLOW), pytest.param("resnet50", marks=SLOW)])
def test_autograd_keeps_under_autocast_what_the_table_says(name: str) -> None:
    network = plain_of(name, 64)
    kept = estimate.saved_bytes(network, 64, autocast=torch.bfloat16)
    weights = 2 * sum(p.numel() for p in network.parameters())  # autocast's copies of them, which are no activations
    expected = published(name, 64, None, "bf16").kept_bytes
    assert kept - weights / 2 == pytest.approx(expected, rel=0.1)  # measured on two images
