"""Small real data sets, packed afresh for the tests that need them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.manifest import Manifest
from pipelines.pack import pack

Painter = Callable[[int], Image.Image]


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
    """The folder in many small shards."""
    out = tmp_path_factory.mktemp("labelled") / "shards"
    pack(folder, out, run_rows=5)
    return Manifest.open(out)


@pytest.fixture(scope="session")
def many_shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The folder in shards of a few records."""
    from pipelines import records
    from pipelines.prepare import prepare
    from pipelines.shards import ShardWriter
    from pipelines.sources.folder import list_folder
    from pipelines.split import write_order

    out = tmp_path_factory.mktemp("many") / "shards"
    listed: list[records.Record] = list(list_folder(folder).records)
    order = write_order(listed, np.arange(len(listed)), "labelled", 5, 3)
    names = sorted({record.entity or "" for record in listed})
    with ShardWriter(out, "labelled", max_shard_bytes=20_000, class_names=names) as writer:
        for index in order.tolist():
            writer.write(listed[index], [prepare(image.read()) for image in listed[index].images])
    return Manifest.open(out)


@pytest.fixture(scope="session")
def make_classes() -> Callable[[Path, dict[str, int]], Path]:
    return fill_classes
