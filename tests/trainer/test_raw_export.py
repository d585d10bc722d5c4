"""A raw encoder as it leaves the house, and in the report: the same vectors, euclidean distance, nothing of the sphere."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from configs.schema import Encoder
from tests.trainer.test_report import Set
from trainer.encoders import build_encoder
from trainer.export import export_encoder, largest_error, load_exported
from trainer.portable_model import Encoder as Portable
from trainer.report.data import ReportData
from trainer.report.insight import look
from trainer.report.page import write_report
from trainer.report.search import search
from trainer.report.spread import spread

SIZE = 20


def lenet() -> nn.Module:
    torch.manual_seed(0)
    part = {"name": "lenet", "widths": [4, 6], "hidden": [8]}
    return build_encoder(Encoder.model_validate(part), SIZE).eval()


def images(count: int) -> tuple[list[bytes], Tensor]:
    """PNGs, and their pixels [n, 3, S, S]."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    files = []
    for one in pixels:
        buffer = io.BytesIO()
        Image.fromarray(one).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files, torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("onnx", [True, False])
def test_the_exported_vectors_are_raw_and_matched_by_distance(tmp_path: Path, onnx: bool) -> None:
    encoder, (files, pixels) = lenet(), images(6)
    with torch.no_grad():
        expected = encoder(pixels / 255).numpy()
    distance = np.linalg.norm(expected[0] - expected[1:], axis=1)
    cut = float(np.sort(distance)[1:3].mean())  # between two of them
    export_encoder(
        encoder, tmp_path / "e", image_size=SIZE, resize="squash", card={}, thresholds={2: {"far_1e-3": cut}}, onnx=onnx
    )
    exported = load_exported(tmp_path / "e")
    assert isinstance(exported, Portable)
    np.testing.assert_allclose(exported(files), expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(np.linalg.norm(expected, axis=1), 1, atol=0.1)
    assert exported.match(files[:1] * 5, files[1:]).tolist() == (distance <= cut).tolist()
    assert exported.match(files[0], files[0]).tolist() == [True]
    with pytest.raises(ValueError, match="dim 1 is for vectors of length 1"):
        exported(files, dim=1)
    card = (tmp_path / "e" / "MODEL_CARD.md").read_text()
    assert "distance is at most this" in card
    assert "euclidean" in card
    assert "int8" not in card
    assert json.loads((tmp_path / "e" / "preprocessing.json").read_text())["distance"] == "euclidean"


def test_the_error_is_a_share_of_the_spread() -> None:
    ours = np.array([[100, 0], [102, 0]], dtype=np.float32)  # one from their mean
    assert largest_error(ours, ours) == 0
    assert largest_error(ours, ours + np.array([[0.5, 0], [0, 0]], dtype=np.float32)) == pytest.approx(0.5)
    assert np.isnan(largest_error(ours, ours * np.nan))


def test_the_report_searches_and_counts_by_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(70, 3, generator=generator) * 4 + 30
    group = torch.arange(70) % 7
    exact = torch.cdist(vectors.double(), vectors.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = search(vectors, group, 5, chunk=16, raw=True)
    others = exact.masked_fill(torch.eye(70, dtype=torch.bool), torch.inf)
    assert torch.equal(found.nearest, others.topk(5, largest=False).indices)
    torch.testing.assert_close(-found.cosine, others.topk(5, largest=False).values)
    first, second = torch.triu_indices(70, 70, 1)
    same = group[first] == group[second]
    positive, negative = exact[first, second][same], exact[first, second][~same]
    nearer = (positive[:, None] < negative[None, :]).double().mean()
    counted = spread(vectors, group, raw=True)
    assert counted.nearer == pytest.approx(float(nearer), abs=2e-3)  # of bins
    assert int(counted.positive.sum()) == 2 * len(positive)
    assert counted.farthest >= float(exact.max())


@pytest.mark.parametrize(("classes", "dim"), [(3, 2), (25, 2), (3, 4)])
def test_two_numbers_are_drawn_as_they_are_and_more_on_a_map(tmp_path: Path, classes: int, dim: int) -> None:
    shown = Set([f"${n}" for n in range(classes)], 4)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(shown.group), dim, generator=generator) * 3
    insight = look(shown, vectors, vectors / 100, raw=True)
    assert insight is not None
    page = write_report(tmp_path, ReportData(name="x", insight=insight)).read_text("utf-8")
    assert ("at its own vector" in page) == (dim == 2)
    assert "The euclidean distance of every two images" in page
    assert (tmp_path / "report" / "distances-after.png").exists()
    drawn = (tmp_path / "report" / "map-after.svg").read_text("utf-8")
    if dim == 2:
        assert (drawn.count("$0") == 1) == (classes <= 20)
        assert len(re.findall("<use ", drawn)) >= len(vectors)
    assert insight.sheets[0].neighbours[0].cosine >= 0
