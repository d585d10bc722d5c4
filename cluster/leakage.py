"""Images that are in two data sets, or twice in one: for `nearfar inspect`, and before a run trains on what it is judged by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.models import open_model
from cluster.progress import say
from cluster.runfolder import write_atomically
from configs.schema import RunConfig
from pipelines.duplicates import (
    DISTANCE,
    KINDS,
    Allowed,
    Matches,
    across_classes,
    anything,
    lookalikes,
    same_files,
)
from pipelines.fingerprints import Images, file_of, images_of, names_of, places_of, prints_of
from pipelines.manifest import Manifest
from pipelines.parallel import Map, in_process, ordered_map
from pipelines.phash import TOLERANCE
from pipelines.remote import is_url
from pipelines.shard_images import ShardImages
from pipelines.tiles import Tile, draw_tiles

FILE = "leakage.json"  # in the run's folder
LISTED = 1000  # pairs that are told
DRAWN, PAIRS_A_ROW = 48, 4
COSINE = 0.99  # see tests/cluster/test_leakage.py
BLOCK = 2048  # images compared with as many others at a time
FEW_SECONDS, IMAGE_S, PIXELS_PER_S = 5.0, 1e-3, 30e6  # what a start may take longer; of hashing in one thread
MOST_UIDS, MOST_REMOTE_UIDS = 20_000_000, 1_000_000

Vectors = NDArray[np.float32]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Found:
    """Matches of `images` of one data set with `others` of another (or the same), and how they were looked for."""

    manifest: Manifest
    other: Manifest
    images: Images
    others: Images
    matches: Matches
    unreadable: int
    checked: dict[str, Any]

    def pairs(self, ours: str, theirs: str) -> list[dict[str, Any]]:
        """The first LISTED, the surest kind first; `ours` and `theirs` name the two sides."""
        order = np.argsort(self.matches.kind, kind="stable")[:LISTED]
        mine = names_of(self.manifest, self.images, self.matches.ours[order])
        others = names_of(self.other, self.others, self.matches.theirs[order])
        about = zip(mine, others, self.matches.kind[order].tolist(), self.matches.score[order].tolist(), strict=True)
        return [{ours: a, theirs: b, "kind": KINDS[kind], "score": round(score, 4)} for a, b, kind, score in about]


def compare(
    manifest: Manifest,
    other: Manifest | None = None,
    *,
    model: str | None = None,
    threshold: float = COSINE,
    distance: int = DISTANCE,
    map: Map = in_process,
    progress: Progress | None = None,
) -> Found:
    """For each image of `manifest` the most alike one of `other`; without one, an earlier image of another class.

    By bytes, pixels and perceptual hash, and by cosine above `threshold` where a `model` is given.
    Raises ValueError for a distance or a model that cannot be used, RuntimeError when data cannot be read.
    """
    if model is not None:
        _require_cosine(model)
    ours, unreadable = prints_of(manifest, map=map, progress=progress)
    theirs, more = (ours, 0) if other is None else prints_of(other, map=map, progress=progress)
    allowed = across_classes(ours.images) if other is None else anything
    matches = same_files(ours.images, theirs.images, allowed).or_else(lookalikes(ours, theirs, allowed, distance=distance))
    checked: dict[str, Any] = {"bytes": True, "pixels": True, "distance": distance, "tolerance": TOLERANCE}
    if model is not None:
        mine = _encode(model, manifest, ours.images)
        matches = matches.or_else(
            _alike(mine, mine if other is None else _encode(model, other, theirs.images), allowed, threshold)
        )
        checked |= {"model": model, "threshold": threshold}
    return Found(manifest, other or manifest, ours.images, theirs.images, matches, unreadable + more, checked)


def draw(found: Found, file: Path) -> None:
    """A sheet of pairs side by side, those that are least alike first. Raises ValueError when `file` is no .png."""
    matches = found.matches
    order = np.lexsort((matches.score, -matches.kind))[:DRAWN]
    names = names_of(found.manifest, found.images, matches.ours[order])
    others = names_of(found.other, found.others, matches.theirs[order])
    tiles = []
    for row, name, other in zip(order.tolist(), names, others, strict=True):
        ours, theirs = (int(side[row]) for side in (matches.ours, matches.theirs))
        note = f"{KINDS[int(matches.kind[row])]} {matches.score[row]:.3f}"
        tiles.append(Tile(file_of(found.manifest, found.images, ours), name, note))
        tiles.append(Tile(file_of(found.other, found.others, theirs), other))
    draw_tiles([tiles[start : start + 2 * PAIRS_A_ROW] for start in range(0, len(tiles), 2 * PAIRS_A_ROW)], file)


def check_run(config: RunConfig, train: Manifest, run: Path) -> None:
    """Tell in one line how many images of `data.eval` are trained on, and write them into RUN/leakage.json.

    By the manifests alone, and by what images look like where `data.check_duplicates` says so or it takes a few seconds.
    """
    if config.data.eval is None:
        return
    evaluation = Manifest.open(config.data.eval, cache=config.data.cache)
    wanted = config.data.check_duplicates
    if wanted is False or (wanted == "auto" and not _can_list(train, evaluation)):
        return
    if wanted is True or _seconds(train, evaluation) <= FEW_SECONDS:
        found = compare(evaluation, train, map=partial(_in_threads, config.data.threads))
    else:
        images, others = images_of(evaluation), images_of(train)
        found = Found(evaluation, train, images, others, same_files(images, others), 0, {"bytes": True})
    counts = found.matches.counts()
    about = {"pairs": found.pairs("eval", "train"), "counts": counts, "checked": found.checked}
    write_atomically(run / FILE, json.dumps(about, indent=1) + "\n")
    if total := sum(counts.values()):
        say(
            f"{total} of {len(found.images.uid)} images of data.eval are in data.train too ({counts['same']} the same, "
            f"{counts['near']} nearly), so results look better than they are; listed in {run / FILE}"
        )


def _can_list(*manifests: Manifest) -> bool:
    remote = any(is_url(manifest.location) for manifest in manifests)
    return sum(manifest.num_images for manifest in manifests) <= (MOST_REMOTE_UIDS if remote else MOST_UIDS)


def _seconds(*manifests: Manifest) -> float:
    """What hashing all images takes, about."""
    if any(manifest.num_images * IMAGE_S > FEW_SECONDS or is_url(manifest.location) for manifest in manifests):
        return np.inf
    tables = [manifest.table(shard) for manifest in manifests for shard in range(len(manifest.sizes))]
    pixels = sum(float((table.width * table.height).sum()) for table in tables)
    return sum(manifest.num_images for manifest in manifests) * IMAGE_S + pixels / PIXELS_PER_S


def _in_threads(threads: int, function: Callable[[Any], Any], items: Any) -> Any:
    return ordered_map(function, items, threads)


def _require_cosine(reference: str) -> None:
    model = open_model(reference)
    if model.raw:
        raise ValueError(
            f"--model: the vectors of {model.origin} are raw, compared by euclidean distance, and --threshold is a cosine; "
            "give a model of unit vectors"
        )


def _encode(reference: str, manifest: Manifest, images: Images) -> Vectors:
    """The vectors of these images, zero for one that cannot be read.  [n, dim]"""
    model = open_model(reference)
    vectors = np.zeros((len(images.uid), model.dim), np.float32)
    rows = {place: row for row, place in enumerate(places_of(manifest, images, np.arange(len(vectors))))}
    source = ShardImages(manifest.location)
    with torch.inference_mode():
        for pixels in source.pixels(source.span(0, 0, source.num_records), model.data(manifest.location), 256):
            found = model.module(pixels.images.contiguous()).float().numpy()
            for name, reason, vector in zip(pixels.names, pixels.reason, found, strict=True):
                row = rows.get((name.record, name.member))
                if row is not None and not reason:
                    vectors[row] = vector
    return vectors


def _alike(ours: Vectors, theirs: Vectors, allowed: Allowed, threshold: float) -> Matches:
    """For each of ours the one of theirs with the largest cosine, where that is at least `threshold`; ties to the first."""
    best, which = np.full(len(ours), -np.inf, np.float32), np.zeros(len(ours), np.int64)
    for mine in _blocks(len(ours)):
        for others in _blocks(len(theirs)):
            cosine = np.where(allowed(mine[:, None], others[None, :]), ours[mine] @ theirs[others].T, -np.inf)
            place = cosine.argmax(axis=1)
            value = cosine[np.arange(len(mine)), place]
            better = value > best[mine]
            best[mine] = np.where(better, value, best[mine])
            which[mine] = np.where(better, others[place], which[mine])
    rows = np.flatnonzero(best >= threshold)
    return Matches.of("encoder", rows, which[rows], best[rows].astype(np.float64))


def _blocks(count: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, count, BLOCK):
        yield np.arange(start, min(start + BLOCK, count))
