"""Packing against plain `tar` of the same folder: `make bench`, and `NEARFAR_BENCH=full make bench` for more images.

No time is asserted: machines differ and are shared. What is asserted is that the shards hold the very images of the folder.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.decode import decode
from pipelines.pack import pack
from pipelines.parallel import process_map
from tests.benchmarks.measure import FULL, fastest, table

pytestmark = pytest.mark.benchmark

NUM_IMAGES = 20_000 if FULL else 1_500
ROUNDS = 2
WIDTH, HEIGHT = 500, 375
SHARD_MB = 32


def make_photos(root: Path) -> Path:
    """Crops of scikit-learn's two sample photos, by class; all different."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        photo = photos[i % len(photos)]
        left, top = rng.integers(0, photo.width - WIDTH + 1), rng.integers(0, photo.height - HEIGHT + 1)
        folder = root / f"class {i % 20:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        photo.crop((left, top, left + WIDTH, top + HEIGHT)).save(folder / f"{i}.jpg", quality=90)
    return root


def images_in(shards: Path) -> set[bytes]:
    found = set()
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            found |= {tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")}  # type: ignore[union-attr]
    return found


@pytest.mark.skipif(shutil.which("tar") is None, reason="no `tar` here to compare with")
def test_packing_over_plain_tar(tmp_path: Path) -> None:
    source = make_photos(tmp_path / "photos")
    files = sorted(source.rglob("*.jpg"))
    number = itertools.count()

    def packed(**options: object) -> Callable[[], object]:
        return lambda: pack(source, tmp_path / f"out{next(number)}", max_shard_mb=SHARD_MB, **options)  # type: ignore[arg-type]

    functions: dict[str, Callable[[], object]] = {
        "tar": partial(subprocess.run, ["tar", "cf", tmp_path / "plain.tar", "-C", tmp_path, "photos"], check=True),
        "read and decode, 1 thread": lambda: [decode(file.read_bytes()) for file in files],
        "pack, 1 worker": packed(),
        "pack, 2 threads": packed(workers=2),
        "pack, 2 processes": packed(map=process_map(2)),
        "pack --max-side 256, 1 worker": packed(max_side=256),
    }
    seconds = fastest(functions, ROUNDS)
    assert images_in(tmp_path / "out0") == {file.read_bytes() for file in files}
    rows = [
        (name, f"{NUM_IMAGES / s:.0f}", f"{seconds['tar'] / s:.2f}", f"{seconds['read and decode, 1 thread'] / s:.2f}")
        for name, s in seconds.items()
    ]
    megabytes = sum(file.stat().st_size for file in files) / 2**20
    title = f"Packing {NUM_IMAGES} JPEGs of {WIDTH}x{HEIGHT} ({megabytes:.0f} MB) into shards of {SHARD_MB} MB"
    table(f"{title}; a process takes seconds to start", ["what", "images/s", "over tar", "over decoding"], rows)
