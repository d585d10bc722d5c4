"""How large shards become."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cuts import cut, estimate
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.prepare import prepare
from pipelines.sources.folder import list_folder


def test_shards_stay_below_the_size_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(4):
            noise = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
            noise.save(tmp_path / "src" / name / f"{i}.png")
    pack(tmp_path / "src", tmp_path / "out", max_shard_mb=1)
    manifest = Manifest.open(tmp_path / "out")
    assert manifest.sizes.tolist() == [2, 2, 2, 2]
    assert manifest.nbytes.max() <= 2**20 + 10240  # tar fills up its last record


def test_shards_hold_no_more_records_than_asked_for(tmp_path: Path, folder: Path) -> None:
    pack(folder, tmp_path / "out", max_shard_records=10)
    assert Manifest.open(tmp_path / "out").sizes.tolist() == [10] * 5 + [6]


def test_a_chunk_that_was_cut_too_long_becomes_several_shards(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.pack.cut", lambda nbytes, max_bytes, max_records: [0, len(nbytes)])
    monkeypatch.setattr("pipelines.pack.MB", 20_000)
    pack(folder, tmp_path / "out", max_shard_mb=1)
    manifest = Manifest.open(tmp_path / "out")
    assert len(manifest.sizes) > 5
    assert manifest.nbytes.max() <= 20_000 + 10240  # tar fills up its last record
    keys = [key for shard in range(len(manifest.sizes)) for key in manifest.keys(shard)]
    assert [int(key[:10]) for key in keys] == list(range(56))


def test_chunks_are_cut_by_what_records_take_in_a_shard(tmp_path: Path, folder: Path) -> None:
    listing = list_folder(folder)
    order = np.arange(56)[::-1]
    told = estimate(listing.records, order, "labelled", sizes=listing.sizes, prepare=prepare, transcodes=False, threads=1)
    paths = [folder / listing.records[i].name for i in order.tolist()]
    assert told.tolist() == [512 + -(-path.stat().st_size // 512) * 512 + 1024 for path in paths]
    guessed = estimate(listing.records, order, "labelled", sizes=None, prepare=prepare, transcodes=False, threads=1)
    assert guessed.sum() == pytest.approx(told.sum() / 0.9, rel=0.05)
    places = cut(told, 20_000, 7)
    parts = [told[start:end] for start, end in itertools.pairwise(places)]
    assert (places[0], places[-1]) == (0, 56)
    assert all(part.sum() <= 20_000 and len(part) <= 7 for part in parts)
    assert cut(np.full(3, 50), 10) == [0, 1, 2, 3]
