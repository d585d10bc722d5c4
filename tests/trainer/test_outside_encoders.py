"""Encoders of other libraries, from a folder: weights, preprocessing and licence come along, and the export is the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from configs.schema import Encoder
from trainer.encoders import build_encoder
from trainer.encoders.licence import UNKNOWN, licence_of
from trainer.export import export_encoder, load_exported, parity

SIZE = 16


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT with random weights, saved as its library saves it."""
    library = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'nearfar[transformers]'")
    folder = tmp_path_factory.mktemp("models") / "vit"
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    library.ViTModel(library.ViTConfig(**shape, image_size=SIZE, patch_size=8)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


def encoder_of(path: Path, size: int = SIZE, **options: Any) -> nn.Module:
    return build_encoder(Encoder.model_validate({"name": "transformers", "path": str(path), **options}), size)


def test_a_folder_gives_the_vectors_of_its_library(vit: Path) -> None:
    import transformers

    images = torch.rand(3, 3, SIZE, SIZE)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    tokens = transformers.ViTModel.from_pretrained(vit)((images - mean) / std).last_hidden_state
    for pool, expected in (("first", tokens[:, 0]), ("mean", tokens.mean(1))):
        found = encoder_of(vit, pool=pool).eval()(images)
        torch.testing.assert_close(found, nn.functional.normalize(expected, dim=1), rtol=1e-5, atol=1e-6)


def test_every_weight_that_learns_gets_a_gradient_also_with_checkpointing(vit: Path) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = encoder_of(vit, dim=4, freeze=1, checkpointing=checkpointing).train()
        (encoder(torch.ones(2, 3, SIZE, SIZE)) * torch.arange(4)).sum().backward()
        found.append({n: p.grad for n, p in encoder.named_parameters() if p.requires_grad})
    assert all(grad is not None for grad in found[0].values())
    assert not any("embeddings" in name or "pooler" in name for name in found[0])
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name])


def test_the_export_is_the_encoder_and_knows_its_preprocessing(vit: Path, tmp_path: Path) -> None:
    encoder = encoder_of(vit, dim=4)
    done = export_encoder(encoder, tmp_path / "export", image_size=SIZE, resize="squash", card={"Encoder": encoder.about})
    assert done.runtime == "onnx", done.why_torch
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    exported = load_exported(tmp_path / "export")
    assert parity(encoder, exported, [buffer.getvalue()], lambda _: torch.from_numpy(pixels).permute(2, 0, 1)) > 0.99999
    card = (tmp_path / "export" / "MODEL_CARD.md").read_text()
    assert "apache-2.0" in card
    assert "mean [0.1, 0.2, 0.3], over std [0.4, 0.5, 0.6]" in card


def test_images_of_another_size_are_refused(vit: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.image_size"):
        encoder_of(vit, size=24)


def test_a_folder_of_timm_gives_its_weights(tmp_path: Path) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    from safetensors.torch import save_file

    model = timm.create_model("resnet18", num_classes=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    facts = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "license": "mit", "num_classes": 3, "classifier": "fc"}
    about = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {**facts, "first_conv": "conv1"}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    part = {"name": "timm", "model": str(tmp_path), "freeze_batchnorm": True}
    encoder: Any = build_encoder(Encoder.model_validate(part), 32)
    assert torch.equal(encoder.model.conv1.weight, model.conv1.weight)
    assert encoder.about["licence of the weights"] == "mit"
    done = export_encoder(encoder, tmp_path / "export", image_size=32, resize="squash", card={})
    assert done.runtime == "onnx", done.why_torch
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    assert parity(encoder, load_exported(tmp_path / "export"), [buffer.getvalue()] * 3, lambda _: pixels) > 0.99999


@pytest.mark.parametrize(
    ("card", "licence"), [("---\nlicense: mit\n---\n", "mit"), ("# none", UNKNOWN), (None, UNKNOWN), ("---\n: [\n---", UNKNOWN)]
)
def test_the_licence_is_what_the_model_card_says(card: str | None, licence: str) -> None:
    assert licence_of(card) == licence


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_what_is_not_installed_or_not_there_is_one_message(name: str, tmp_path: Path) -> None:
    option = {"timm": "model", "transformers": "path"}[name]
    with pytest.raises(ValueError, match=rf"encoder\.({option}|name)"):
        build_encoder(Encoder.model_validate({"name": name, option: str(tmp_path)}), SIZE)
