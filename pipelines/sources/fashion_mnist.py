"""Fashion-MNIST: 70,000 grey pictures of clothes in ten classes."""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.folders import require_free
from pipelines.sources.fetched import ClassImage, FetchSummary, Licence, Progress, write_images

PACKAGE = "dataset-fashion-mnist"
TIMEOUT_S = 900
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
PARTS = {"train": "train", "test": "t10k"}  # our name, name of the files
LICENCES = (Licence("all", "Zalando SE, Fashion-MNIST, <https://github.com/zalandoresearch/fashion-mnist>", "MIT"),)


def fetch(
    out: Path, *, cache: Path | None = None, progress: Progress | None = None, source: Path | None = None
) -> FetchSummary:
    """Write OUT/<class>/<part>-<number>.png.

    The four IDX files (.gz) come from the folder `source`, else from Debian's package, unpacked without root.
    Raises ValueError for a folder without them, RuntimeError when apt-get cannot download the package.
    """
    require_free(out)
    with tempfile.TemporaryDirectory(prefix="nearfar-") as temporary:
        folder = source if source is not None else _unpack(Path(temporary))
        pictures = {name: _read_part(folder, prefix) for name, prefix in PARTS.items()}
    total = sum(len(labels) for _, labels in pictures.values())
    return write_images(out, _images(pictures), LICENCES, title="Fashion-MNIST", total=total, progress=progress)


def _unpack(temporary: Path) -> Path:
    """Debian's package into a temporary folder."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise RuntimeError(
                f"Fashion-MNIST comes from Debian's package {PACKAGE}, and there is no {program} here; download its four "
                "*-ubyte.gz files and give their folder as `source`"
            )
    _run(["apt-get", "download", PACKAGE], temporary)
    packages = sorted(temporary.glob(f"{PACKAGE}_*.deb"))
    if not packages:
        raise RuntimeError(f"apt-get download {PACKAGE} left no package behind; run `apt-get update` and try again")
    _run(["dpkg-deb", "-x", packages[0].name, "unpacked"], temporary)
    found = sorted((temporary / "unpacked").rglob("train-images-idx3-ubyte.gz"))
    if not found:
        raise RuntimeError(f"Debian's package {PACKAGE} holds no train-images-idx3-ubyte.gz")
    return found[0].parent


def _run(command: list[str], folder: Path) -> None:
    try:
        result = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"`{' '.join(command)}` took more than {TIMEOUT_S // 60} minutes; try again") from None
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"`{' '.join(command)}` failed ({last}); run `apt-get update` as root and try again, or give a folder with the "
            "four *-ubyte.gz files as `source`"
        )


def _read_part(folder: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images, labels = (read_idx(folder / f"{prefix}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) >= len(CLASSES):
        raise ValueError(
            f"the {prefix} files in {str(folder)!r} do not belong together: {images.shape} images, {labels.shape} labels"
        )
    return images, labels


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes in the IDX format, gzipped. Raises ValueError when it is missing or something else."""
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}; the folder must hold Fashion-MNIST's four *-ubyte.gz files")
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    dimensions = data[3] if len(data) >= 4 else 0
    shape = np.frombuffer(data[4 : 4 + 4 * dimensions], ">u4").astype(np.int64)
    body = data[4 + 4 * dimensions :]
    if data[:3] != b"\0\0\x08" or len(shape) != dimensions or len(body) != shape.prod():
        raise ValueError(f"{str(path)!r} is no IDX file of bytes, or is cut off")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _images(pictures: dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> Iterator[ClassImage]:
    for part, (images, labels) in pictures.items():
        for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            yield ClassImage(CLASSES[label], f"{part}-{index:05d}.png", buffer.getvalue())
