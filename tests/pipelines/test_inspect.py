"""What `inspect` counts and draws, compared with the files themselves and with the loader's batches."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Augment, Data
from pipelines.augment import apply
from pipelines.index import index
from pipelines.inspect import inspect, quantiles_of
from pipelines.manifest import Manifest
from pipelines.sheet import CAPTION, GAP, MARGIN, MASKED, draw_sheet
from tests.conftest import Answer
from tests.pipelines.streams import take
from tests.pipelines.tars import stock_samples, write_stock


def test_counts_and_quantiles_are_those_of_the_files(many_shards: Manifest, folder: Path) -> None:
    found = inspect(many_shards)
    sizes = sorted(-(-path.stat().st_size // 1024) for path in folder.rglob("*.png"))
    assert (found.records, found.images, found.distinct_images, found.bad) == (56, 56, 56, 0)
    assert found.quantiles["width"] == dict.fromkeys(found.quantiles["width"], 40)
    assert found.quantiles["kilobytes"]["max"] == sizes[-1]
    assert found.quantiles["kilobytes"]["median"] == statistics.median_low(sizes)
    assert found.formats == {"PNG": 1.0}
    assert found.nbytes == sum(path.stat().st_size for path in many_shards.path.glob("*.tar"))
    assert (found.classes["count"], found.classes["singles"]) == (7, 0)
    assert found.classes["largest"]["klasse 6"] == 14
    assert next(iter(found.classes["smallest"].items())) == ("klasse 0", 2)
    assert found.classes["images_per_class"]["median"] == 8
    assert found.classes["longest_run"] == many_shards.runs.length.max()


def test_quantiles_are_lower_quantiles() -> None:
    values = np.random.default_rng(0).integers(0, 50, 1000)
    found = quantiles_of(np.bincount(values))
    for name, share in (("min", 0.0), ("5%", 0.05), ("25%", 0.25), ("median", 0.5), ("95%", 0.95), ("max", 1.0)):
        assert found[name] == np.quantile(values, share, method="inverted_cdf")


def test_the_other_kinds_are_counted(tmp_path: Path, triplets: Manifest) -> None:
    found = inspect(triplets)
    counts = Counter(np.diff(triplets.table(0).start) - 2)
    assert found.negatives == {str(count): records for count, records in counts.items()}
    assert found.weights == {"min": 1.0, "mean": 6.5, "max": 12.0}
    samples = stock_samples("labelled_pair", 9)
    samples[3]["right.jpg"] = samples[3]["left.jpg"]
    write_stock(tmp_path / "tars", samples)
    index([tmp_path / "tars"])
    found = inspect(Manifest.open(tmp_path / "tars"))
    assert (found.matches, found.images, found.distinct_images) == (4, 18, 17)
    assert found.formats == {"JPEG": 1.0}
    assert found.groups == {"groups": 9, "records_in_the_largest": 1}


def thumbs(sheet: Path, rows: int, columns: int, thumb: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    step, rise = thumb + GAP, thumb + GAP + CAPTION
    corners = [(GAP + row * rise, MARGIN + column * step) for row in range(rows) for column in range(columns)]
    return [pixels[top : top + thumb, left : left + thumb] for top, left in corners]


def test_the_sheet_shows_the_pixels_that_training_gets(tmp_path: Path, many_shards: Manifest) -> None:
    augment = Augment(crop=(0.4, 0.8), flip=0.5, rotate=20, color=0.4)
    data = Data(train="x", image_size=56, batch=64, per_class=3, augment=augment)
    assert draw_sheet(many_shards, tmp_path / "sheet.png", data=data, seed=9) == 12
    (batch,) = take(many_shards, data.model_copy(update={"batch": 36}), 1, seed=9)
    expected = (apply(batch.images, batch.draws, augment) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    shown = thumbs(tmp_path / "sheet.png", 12, 3, 112)
    masked = np.full((112, 112, 3), [int(MASKED[i : i + 2], 16) for i in (1, 3, 5)])
    assert not batch.valid.all()
    for index_, thumb in enumerate(shown):
        wanted = np.repeat(np.repeat(expected[index_], 2, 0), 2, 1) if batch.valid[index_] else masked
        assert np.array_equal(thumb, wanted)


@pytest.mark.parametrize("kind", ["pair", "labelled_pair", "triplet", "labelled"])
def test_every_kind_has_a_sheet(tmp_path: Path, kind: str) -> None:
    write_stock(tmp_path, stock_samples(kind, 7))
    index([tmp_path])
    rows = draw_sheet(Manifest.open(tmp_path), tmp_path / "sheet.png")
    assert rows == (5 if kind == "labelled" else 7)  # classes, or records
    assert Image.open(tmp_path / "sheet.png").size[1] == GAP + rows * (112 + GAP + CAPTION)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match=r"a \.png"):
        draw_sheet(Manifest.open(tmp_path), tmp_path / "sheet.jpg")


def test_the_command_draws_with_a_config(
    digits: Path, config_file: Path, tmp_path: Path, nearfar: Callable[..., Answer]
) -> None:
    answer = nearfar("inspect", digits / "train", "--sheet", tmp_path / "s.png", "--config", config_file, "--json")
    found = json.loads(answer.out)
    assert (answer.code, found["kind"], found["classes"]["count"], found["sheet"]) == (
        0,
        "labelled",
        10,
        str(tmp_path / "s.png"),
    )
    assert Image.open(tmp_path / "s.png").size == (MARGIN + 2 * (112 + GAP) + GAP, GAP + 12 * (112 + GAP + CAPTION))
    answer = nearfar("inspect", digits / "train")
    assert "10, 0 of them of a single image" in answer.out
    assert nearfar("inspect", digits / "train", "--config", config_file).code == 2
