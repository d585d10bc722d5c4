"""Shards and their manifest, compared with the files that were packed and with stock webdataset."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from pipelines.hashing import hash_bytes, hash_entity
from pipelines.manifest import Manifest
from pipelines.pack import pack

Painter = Callable[..., Image.Image]
MakeClasses = Callable[[Path, dict[str, int]], Path]


def test_stock_webdataset_reads_the_shards(labelled: Manifest, folder: Path) -> None:
    seen = {}
    for shard in range(len(labelled.sizes)):
        for sample in wds.WebDataset(str(labelled.shard_path(shard)), shardshuffle=False, empty_check=False).decode("pil"):
            assert set(sample) - {"__key__", "__url__", "__local_path__"} == {"png", "cls"}
            seen[sample["__key__"]] = (np.asarray(sample["png"]), sample["cls"])
    names = sorted({path.parent.name for path in folder.rglob("*.png")})
    keys = [key for shard in range(len(labelled.sizes)) for key in labelled.keys(shard)]
    sources = [source for shard in range(len(labelled.sizes)) for source in labelled.sources(shard)]
    assert len(seen) == len(keys) == 56
    for key, source in zip(keys, sources, strict=True):
        pixels, label = seen[key]
        assert (pixels == np.asarray(Image.open(folder / source))).all()
        assert names[label] == Path(source).parent.name


def test_the_manifest_tells_where_every_image_lies(many_shards: Manifest, folder: Path) -> None:
    assert len(many_shards.sizes) > 5
    assert many_shards.starts.tolist() == [0, *np.cumsum(many_shards.sizes).tolist()]
    for shard in range(len(many_shards.sizes)):
        table = many_shards.table(shard)
        data = many_shards.shard_path(shard).read_bytes()
        assert len(data) == many_shards.nbytes[shard]
        with tarfile.open(many_shards.shard_path(shard)) as tar:
            members = {member.offset_data: member for member in tar if member.name.endswith(".png")}
        assert sorted(members) == sorted(table.offset.tolist())
        for i, source in enumerate(many_shards.sources(shard)):
            found = data[table.offset[i] : table.offset[i] + table.size[i]]
            assert found == (folder / source).read_bytes()
            assert members[table.offset[i]].name.startswith(many_shards.keys(shard)[i] + ".")
            assert (table.uid[i], table.crc32[i]) == (hash_bytes(found), zlib.crc32(found))
            assert table.group[i] == hash_entity(Path(source).parent.name)
            assert (table.width[i], table.height[i], table.view[i]) == (40, 32, 0)


def test_runs_hold_one_class_and_are_shuffled(many_shards: Manifest, labelled: Manifest) -> None:
    for manifest in (many_shards, labelled):
        runs = manifest.runs
        assert runs.length.max() <= 10  # two runs of 5 may come to stand side by side
        assert runs.length.sum() == manifest.num_samples
        for shard, start, length in zip(runs.shard, runs.start, runs.length, strict=True):
            assert len(set(manifest.table(int(shard)).group[start : start + length].tolist())) == 1
    first = [labelled.class_names[int(labelled.table(0).group[start])] for start in labelled.runs.start]
    assert first != sorted(first)


def test_class_names_and_counts_are_kept(labelled: Manifest) -> None:
    counts = {labelled.class_names[group]: count for group, count in labelled.class_counts.items()}
    assert counts == {f"klasse {i}": 2 * (i + 1) for i in range(7)}
    assert labelled.num_classes == 7


def test_a_manifest_that_is_not_right_is_refused(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    pack(folder, out, eval_fraction=0.3)
    with pytest.raises(ValueError, match=r"did you mean .*eval or .*train"):
        Manifest.open(out)
    with pytest.raises(ValueError, match="no folder"):
        Manifest.open(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no shards"):
        Manifest.open(folder)
    file = out / "train" / "manifest.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "digest": "0" * 64}))
    with pytest.raises(ValueError, match="does not match its digest"):
        Manifest.open(out / "train")
    file.write_text(json.dumps({**about, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        Manifest.open(out / "train")
    file.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Manifest.open(out / "train")
