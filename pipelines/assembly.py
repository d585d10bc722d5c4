"""Finished chunks become data sets: their shards in order, under one manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from configs.errors import Unrecoverable
from pipelines.chunks import TEMPORARY, Finished, Shard, read_chunk
from pipelines.folders import make_folder, sync
from pipelines.manifest_writer import ManifestWriter
from pipelines.shards import shard_name
from pipelines.summary import SetSummary, summarize

REJECTED = "rejected.jsonl"


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a chunk belongs: rows `first` to `end` of the write order of a data set (`train`, `eval` or `all`)."""

    part: str
    folder: Path
    first: int
    end: int


def find_spots(chunks: Path, cuts: dict[str, list[int]]) -> list[Spot]:
    """All of them in order; makes the folder they go into, and clears it of what killed tasks have left there."""
    make_folder(chunks, exist_ok=True)
    for left in chunks.glob(f"*{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)
    return [
        Spot(part, chunks / f"{part}-{number:06d}", first, end)
        for part, places in cuts.items()
        for number, (first, end) in enumerate(pairwise(places))
    ]


def assemble(
    spots: list[Spot],
    todo: set[Spot],
    results: Iterator[object],
    rejected: Iterable[tuple[str, str]] = (),
    *,
    kind: str,
    made: Path,
    out: Path,
) -> tuple[dict[str, SetSummary], list[tuple[str, str]]]:
    """Take a result for every spot in `todo` as its turn comes, and move its shards into the data sets in `made`.

    Returns the sets, as they will be called when `made` has become `out`, and all that was `rejected`, before and now. May be
    repeated: what has been moved before stays. Raises Discard when a set comes out useless, RuntimeError when a chunk is not
    where it should be.
    """
    make_folder(made, exist_ok=True)
    sets: dict[str, SetSummary] = {}
    rejected = list(rejected)
    for part, its_spots in groupby(spots, lambda spot: spot.part):
        manifest = ManifestWriter(_below(made, part), kind)
        for spot in its_spots:
            if spot in todo:
                next(results)
            finished = _require(spot)
            rejected += finished.rejected
            for shard in finished.shards:
                _add(manifest, shard)
        manifest.finish()
        sets[part] = summarize(manifest, _below(out, part), rejected)
    with (made / REJECTED).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"image": image, "reason": reason}) + "\n" for image, reason in rejected)
    for path in made.rglob("*"):
        if path.suffix != ".tar":  # those are synced since they were written
            sync(path)
    return sets, rejected


def _require(spot: Spot) -> Finished:
    finished = read_chunk(spot.folder)
    if finished is None:
        raise RuntimeError(
            f"a task has finished, but {str(spot.folder)!r} is not there: OUT must lie on storage that all nodes share"
        )
    return finished


def _add(manifest: ManifestWriter, shard: Shard) -> None:
    name = shard_name(manifest.num_shards)
    place = manifest.out / name
    if shard.tar.is_file():
        os.replace(shard.tar, place)
    elif not place.is_file() or place.stat().st_size != shard.nbytes:
        raise Unrecoverable(f"{str(shard.tar)!r} is lost: remove {str(shard.tar.parents[2])!r} and pack again")
    manifest.add(name, shard.nbytes, shard.sha256, shard.samples)


def _below(folder: Path, part: str) -> Path:
    return folder if part == "all" else folder / part
