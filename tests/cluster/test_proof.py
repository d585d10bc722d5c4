"""An export is compared with the encoder on real images, also without an evaluation set, and what differs is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.exporting import Trained, calibrate, export_trained, matryoshka_of
from cluster.proof import Proof, prove
from cluster.runfolder import RunFolder
from configs.load import load_config
from configs.schema import RunConfig
from trainer.encoders import build_encoder
from trainer.verification import match_thresholds


@pytest.fixture
def config(config_file: Path) -> RunConfig:
    return load_config(config_file, ["loss={name: info_nce, matryoshka: [4, 16]}", "data.max_pixels=123456"])


@pytest.mark.parametrize("held_out", [True, False])
def test_a_run_without_an_evaluation_set_is_proven_on_training_images(
    config: RunConfig, tmp_path: Path, held_out: bool
) -> None:
    if not held_out:
        config = config.model_copy(update={"data": config.data.model_copy(update={"eval": None})})
    torch.manual_seed(0)
    encoder = build_encoder(config.encoder, config.data.image_size).eval()
    done, proof = export_trained(config, RunFolder(tmp_path), Trained(encoder, 7, {"recall_at_1": 0.5}), tmp_path / "out")
    assert done.runtime == "onnx"
    assert len(proof.images) == 256 + 32
    assert sum(image[:2] == b"\xff\xd8" for image in proof.images) == 32
    settings = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert (settings["dims"], settings["max_pixels"]) == ([4, 16], 123456)
    assert sorted(settings["thresholds"]) == (["16", "4"] if held_out else [])
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["tags"]["steps"] == "7"
    assert about["gate"] == {"metric": "recall_at_1", "alias": "champion"}
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "CC BY 4.0" in card
    assert "Intended use" in card


def test_another_encoder_is_refused(config: RunConfig) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(config.encoder, config.data.image_size).eval()
    proof = prove(config, encoder)
    proof.check(lambda images: proof.vectors)
    for wrong in (proof.vectors[::-1], np.full_like(proof.vectors, np.nan)):
        with pytest.raises(RuntimeError, match="of 288 images, the smallest cosine to the trained encoder is"):
            proof.check(lambda images, wrong=wrong: wrong)
    assert isinstance(proof, Proof)


def test_every_length_has_its_own_thresholds(config: RunConfig) -> None:
    assert matryoshka_of(config) == [4, 16]
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(60) % 6
    vectors = torch.nn.functional.normalize(
        torch.randn(6, 16, generator=generator)[group] + torch.randn(60, 16, generator=generator), dim=1
    )
    found = calibrate(vectors, group, [4, 16])
    short = torch.nn.functional.normalize(vectors[:, :4], dim=1)
    for length, cut in ((4, short), (16, vectors)):
        assert found[length] == pytest.approx(match_thresholds(cut, group), abs=1e-6)
    assert calibrate(vectors, torch.arange(60), [16]) == {}
