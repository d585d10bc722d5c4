"""Small real data sets, packed afresh for the tests that need them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from pipelines.columns import entity_names, entity_numbers
from pipelines.manifest import Manifest
from pipelines.manifest_writer import ManifestWriter
from pipelines.pack import pack
from pipelines.prepare import prepare
from pipelines.records import Record
from pipelines.shards import ShardWriter
from pipelines.sources.folder import list_folder
from pipelines.split import write_order

Painter = Callable[..., Image.Image]


def paint(seed: int, size: tuple[int, int] = (40, 32), mode: str = "RGB") -> Image.Image:
    """A smooth picture with some texture, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="session")
def painter() -> Painter:
    return paint


def fill_classes(root: Path, counts: dict[str, int]) -> Path:
    """PNG images by class; every image is different."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            paint(seed).save(root / name / f"im {index}.png")
            seed += 1
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes of 2 to 14 images."""
    counts = {f"klasse {index}": 2 * (index + 1) for index in range(7)}
    return fill_classes(tmp_path_factory.mktemp("source") / "images", counts)


@pytest.fixture(scope="session")
def labelled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The folder in one shard."""
    out = tmp_path_factory.mktemp("labelled") / "shards"
    pack(folder, out, run_rows=5)
    return Manifest.open(out)


@pytest.fixture(scope="session")
def many_shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The folder in shards of a few records."""
    out = tmp_path_factory.mktemp("many") / "shards"
    listed: list[Record] = list(list_folder(folder).records)
    order = write_order(entity_numbers(listed), np.arange(len(listed)), "labelled", 5, 3)
    numbers = {name: number for number, name in enumerate(entity_names(listed))}
    manifest = ManifestWriter(out, "labelled")
    with ShardWriter(out, "labelled", manifest.add, max_bytes=20_000, class_index=numbers) as writer:
        for place, index in enumerate(order.tolist()):
            writer.write(place, listed[index], [prepare(image.read()) for image in listed[index].images])
    manifest.finish()
    return Manifest.open(out)


@pytest.fixture(scope="session")
def make_classes() -> Callable[[Path, dict[str, int]], Path]:
    return fill_classes


@pytest.fixture
def triplets(tmp_path: Path, painter: Painter) -> Manifest:
    """Twelve triplets with one to three negatives."""
    data = []
    for i in range(60):
        buffer = io.BytesIO()
        painter(100 + i).save(buffer, "PNG")
        data.append(buffer.getvalue())
    columns: dict[str, list[Any]] = {"anchor": data[:12], "positive": data[12:24], "weight": [1.0 + i for i in range(12)]}
    for number in range(3):
        part = data[24 + 12 * number : 36 + 12 * number]
        columns[f"negative{number}"] = [value if i % 3 >= number else None for i, value in enumerate(part)]
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    pack(tmp_path / "t.parquet", tmp_path / "triplets", kind="triplet")
    return Manifest.open(tmp_path / "triplets")
