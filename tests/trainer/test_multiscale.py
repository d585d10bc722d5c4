"""The multi-scale network: its maps fit the image, every path counts, and its export is the encoder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from configs.registry import PARTS
from configs.schema import Encoder
from trainer.encoders import build_encoder
from trainer.encoders.convnet import centred
from trainer.encoders.multiscale import MultiScale, Shallow, maxima
from trainer.encoders.stages import stage_numbers
from trainer.export import export_encoder, load_exported, parity
from trainer.portable_model import preprocess

OWN = set(PARTS["encoder"]) - {"timm", "transformers", "projection"}  # the last takes vectors
OPTIONS = {"lenet": {"widths": [8, 8], "hidden": [16], "raw": False}}  # of the others: one small stage
SMALL: dict[str, Any] = {"dim": 8, "widths": [8, 16], "blocks": 1, "grid": 2, "shallow_width": 8}


def multiscale(size: int, **options: Any) -> MultiScale:
    torch.manual_seed(0)
    encoder = build_encoder(Encoder.model_validate({"name": "multiscale", **SMALL, **options}), size)
    assert isinstance(encoder, MultiScale)
    return encoder


@pytest.mark.parametrize(
    ("size", "factor", "kernel", "side"),
    [(224, 4, 8, 15), (224, 8, 8, 8), (48, 4, 8, 4), (48, 8, 4, 4), (32, 4, 4, 5), (32, 8, 2, 5)],
)
def test_the_convolution_is_the_papers_and_shrinks_with_the_image(size: int, factor: int, kernel: int, side: int) -> None:
    path = Shallow(size, factor, 96, 4)
    assert path.conv.kernel_size == (kernel, kernel)
    assert path.conv.stride == (kernel // 2, kernel // 2)
    assert path.conv(torch.zeros(1, 3, size // factor, size // factor)).shape == (1, 96, side, side)
    assert path(torch.rand(2, 3, size, size)).shape == (2, 96 * 4 * 4)


@pytest.mark.parametrize(("side", "kernel", "stride", "padding"), [(15, 7, 4, 2), (8, 3, 2, 1), (5, 2, 1, 0), (4, 1, 1, 0)])
def test_the_maxima_are_those_of_max_pooling(side: int, kernel: int, stride: int, padding: int) -> None:
    """7x7 with stride 4 and 3x3 with stride 2 at 224 pixels."""
    x = torch.randn(2, 3, side, side)
    assert torch.equal(maxima(maxima(x, 4).mT, 4).mT, F.max_pool2d(x, kernel, stride, padding))


@pytest.mark.parametrize("size", [32, 48, 224])
def test_the_vector_is_made_of_three_paths_of_unit_length(size: int) -> None:
    """Written out, in float64."""
    encoder = multiscale(size).double().eval()
    images = torch.rand(3, 3, size, size, dtype=torch.float64)

    def one(x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True)

    paths = []
    for path in encoder.shallow:
        assert isinstance(path, Shallow)
        small = F.avg_pool2d(centred(images), path.factor)
        features = F.gelu(F.conv2d(small, path.conv.weight, path.conv.bias, path.conv.stride, path.conv.padding))
        paths.append(one(maxima(maxima(features, 4).mT, 4).mT.flatten(1)))
    shallow = one(torch.cat(paths, dim=1) @ encoder.looks.weight.T)
    expected = one(torch.cat([encoder.deep(images), shallow], dim=1) @ encoder.head.weight.T)
    torch.testing.assert_close(encoder(images), expected)
    assert encoder(images).shape == (3, encoder.dim)


def test_every_weight_learns_and_belongs_to_a_stage_in_order() -> None:
    encoder = multiscale(32).train()
    (encoder(torch.rand(4, 3, 32, 32)) * torch.randn(4, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert all(path.conv.weight.grad.abs().sum() > 0 for path in encoder.shallow)  # type: ignore[union-attr, operator]
    stages = stage_numbers(encoder)
    assert {stages[name] for name in stages if name.startswith(("deep.body.0.", "shallow."))} == {0}
    assert stages["looks.weight"] == stages["head.weight"] == stages["deep.head.1.weight"] == len(encoder.stages)
    frozen = multiscale(32, freeze=1).train()
    frozen(torch.rand(4, 3, 32, 32)).sum().backward()
    assert {n for n, p in frozen.named_parameters() if p.grad is None} == {n for n in stages if stages[n] == 0}


@pytest.mark.parametrize("name", sorted(OWN))
def test_the_export_is_the_encoder_and_runs_with_onnx(name: str, tmp_path: Path) -> None:
    """Every encoder that comes without another library."""
    torch.manual_seed(0)
    options = OPTIONS.get(name, {"widths": [8], "blocks": 1})
    encoder = build_encoder(Encoder.model_validate({"name": name, "dim": 8, **options}), 48)
    done = export_encoder(encoder, tmp_path / "export", image_size=48, resize="crop", card={})
    assert (done.runtime, done.why_torch) == ("onnx", None)
    random, files = np.random.default_rng(0), []
    for _ in range(5):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(buffer, "PNG")
        files.append(buffer.getvalue())

    def pixels(file: bytes) -> Tensor:
        return torch.from_numpy(preprocess(file, 48, "crop", 10_000))

    assert parity(encoder, load_exported(tmp_path / "export"), files, pixels) > 0.99999


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (16, {"grid": 1}, r"encoder\.shallow_grid: images of 16 pixels .* 8 times smaller .* have 2 pixels"),
        (32, {"subsample": [64]}, r"encoder\.shallow_grid"),
        (32, {"subsample": []}, r"encoder\.subsample"),
        (32, {"dim": 8192, "shallow_width": 4096}, r"encoder\.shallow_width: .* M weights"),
        (32, {"patch": 32}, r"encoder\.grid"),
    ],
)
def test_what_cannot_be_built_is_said(size: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiscale(size, **options)
