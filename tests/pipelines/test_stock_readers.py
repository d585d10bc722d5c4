"""Stock webdataset reads our shards: every record once, with the bytes that were packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset as wds

from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.records import KINDS
from tests.pipelines.conftest import paint
from tests.pipelines.tars import encode, jpeg


def table_of(kind: str, count: int) -> dict[str, list[Any]]:
    """Columns of bytes; JPEG, PNG and WebP by turns."""

    def images(start: int) -> list[bytes]:
        return [[jpeg(n), encode(paint(n), "PNG"), encode(paint(n), "WEBP")][n % 3] for n in range(start, start + count)]

    if kind == "labelled":
        return {"image": images(0), "label": [f"class {n % 4}" for n in range(count)]}
    if kind == "labelled_pair":
        return {"left": images(0), "right": images(100), "match": [n % 2 for n in range(count)]}
    columns: dict[str, list[Any]] = {
        "anchor": images(0),
        "positive": images(100),
        "group": [f"g{n // 2}" for n in range(count)],
    }
    if kind == "triplet":
        columns |= {"negative0": images(200), "negative1": [x if n % 2 else None for n, x in enumerate(images(300))]}
    return columns


@pytest.mark.parametrize("kind", KINDS)
def test_stock_webdataset_reads_every_record_once(tmp_path: Path, kind: str) -> None:
    columns = table_of(kind, 24)
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    pack(tmp_path / "t.parquet", tmp_path / "out", kind=kind)
    manifest = Manifest.open(tmp_path / "out")
    urls = [str(manifest.shard_path(shard)) for shard in range(len(manifest.sizes))]
    samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [key for shard in range(len(urls)) for key in manifest.keys(shard)]
    names = [name for name in ("image", "anchor", "left", "positive", "right", "negative0", "negative1") if name in columns]
    left = [tuple(image for name in names if (image := columns[name][row]) is not None) for row in range(24)]
    for sample in samples:
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        images = {name.rpartition(".")[0]: data for name, data in members.items() if name not in ("cls", "json")}
        order = ["", "anchor", "left", "positive", "right", "negative", "negative0", "negative1"]
        packed = tuple(images[name] for name in order if name in images)
        assert len(packed) == len(images)
        row = left.index(packed)
        left[row] = ()  # once
        if kind == "labelled":
            assert members["cls"] == columns["label"][row][-1:].encode()
        else:
            about = json.loads(members["json"])
            assert about.get("match") == columns.get("match", [None] * 24)[row]
            assert about.get("group") == columns.get("group", [None] * 24)[row]
    assert left == [()] * 24
