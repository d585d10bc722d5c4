"""Tars as other people write them, with stock webdataset."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image

from tests.pipelines.conftest import paint

Sample = dict[str, bytes]


def encode(image: Image.Image, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def jpeg(seed: int) -> bytes:
    return encode(paint(seed))


def stock_samples(kind: str, count: int) -> list[dict[str, Any]]:
    """As one gives them to webdataset's own writers, which encode what is no bytes."""
    samples = []
    for i in range(count):
        sample: dict[str, Any] = {"__key__": f"part/{i:05d}"}
        if kind == "labelled":
            sample |= {"jpg": jpeg(i), "cls": i % 5, "json": {"url": f"number {i}"}, "txt": "a caption"}
        elif kind == "labelled_pair":
            sample |= {"left.jpg": jpeg(2 * i), "right.jpg": jpeg(2 * i + 1), "json": {"match": i % 2}}
        else:
            sample |= {"anchor.jpg": jpeg(9 * i), "positive.jpg": jpeg(9 * i + 1)}
            sample["json"] = {"group": f"thing {i // 2}", "weight": 1.0 + i}
        if kind == "triplet":
            names = ["negative.jpg"] if i % 3 == 0 else [f"negative{n}.jpg" for n in range(1 + i % 3)]
            sample |= {name: jpeg(9 * i + 2 + n) for n, name in enumerate(names)}
            sample["json"]["negative_groups"] = [f"other {n}" for n in range(len(names))]
        samples.append(sample)
    return samples


def write_stock(folder: Path, samples: list[dict[str, Any]], per_tar: int = 10) -> list[Path]:
    """Tars by `webdataset.ShardWriter`: s-000.tar, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(folder / "s-%03d.tar"), maxcount=per_tar, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return sorted(folder.glob("s-*.tar"))
