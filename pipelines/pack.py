"""Packs a folder, a table or tars of images into shards with a manifest."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from pipelines.assembly import REJECTED, Spot, assemble, find_spots
from pipelines.chunks import Chunk, Prepare, read_chunk, write_chunk
from pipelines.columns import entity_names, entity_numbers
from pipelines.counting import Progress, telling
from pipelines.cuts import cut, estimate
from pipelines.folders import require_free
from pipelines.hashing import Int64s
from pipelines.parallel import Map, in_process, process_map
from pipelines.prepare import JPEG_QUALITY, prepare
from pipelines.records import MEMBERS, Listing, Records, require_kind
from pipelines.remote import is_url
from pipelines.sources.fetched import LICENCES
from pipelines.sources.folder import list_folder, list_remote_folder
from pipelines.sources.sampled import Sample, draw
from pipelines.sources.table import TABLE_SUFFIXES, is_table, list_table
from pipelines.sources.tars import list_tars
from pipelines.split import split_records, write_order
from pipelines.summary import PackSummary, SetSummary
from pipelines.tar_urls import is_tars
from pipelines.work import publish, read_json, work_folder, write_json

__all__ = ["REJECTED", "PackSummary", "SetSummary", "list_source", "pack"]
SPLITS = ("class", "record")
CHUNKS, CUTS, MADE = "chunks", "cuts.json", "made"  # in the work folder
MB = 2**20
FEW_RECORDS = 8000  # threads have packed so many before processes, which have to start first, overtake them


@dataclass(frozen=True, slots=True)
class _Options:
    """All that decides which bytes are written."""

    kind: str
    eval_fraction: float
    split: str
    max_shard_mb: int
    max_shard_records: int | None
    max_side: int | None
    quality: int | None
    reencode: bool
    seed: int
    run_rows: int
    sample: Sample


def pack(
    source: str | Path,
    out: Path,
    *,
    kind: str = "labelled",
    eval_fraction: float = 0.0,
    split: str = "class",
    max_shard_mb: int = 256,
    max_shard_records: int | None = None,
    max_side: int | None = None,
    quality: int | None = None,
    reencode: bool = False,
    workers: int = 1,
    seed: int = 0,
    run_rows: int = 64,
    sample: Sample | None = None,
    progress: Progress | None = None,
    map: Map | None = None,
    listing: Listing | None = None,
) -> PackSummary:
    """Write OUT, or OUT/train and OUT/eval when `eval_fraction` is above 0; every image is really decoded on the way.

    `source` is the path or URL of a folder by class, of a table or of tars; with `sample` it holds labelled images, and the
    records are drawn from them; `listing`: its records, where the caller knows them. The same input, options and seed give the
    same bytes, however many workers there are and wherever `map` runs them (default: `workers` processes). Images that cannot
    be decoded are left out and listed, in the summary and in OUT/rejected.jsonl. `progress` hears of images, from another
    thread.

    A call that is stopped leaves OUT.partial behind, and the same call goes on there. Raises ValueError for bad input, with
    nothing written; RuntimeError when the disk is full, a store does not answer, or a worker is killed.
    """
    drawn = sample or Sample()
    options = _Options(
        kind, eval_fraction, split, max_shard_mb, max_shard_records, max_side, quality, reencode, seed, run_rows, drawn
    )
    _check(options, workers)
    started = time.monotonic()
    require_free(out)
    listing = listing or list_source(source, "labelled" if drawn.on else kind)
    if drawn.on:
        _require_two_classes(listing.records, "labelled", f"{str(source)!r}")
        listing = draw(listing, kind, drawn, seed)
    _require_two_classes(listing.records, kind, f"{str(source)!r}")
    orders = _orders(listing.records, options)
    plan = {"source": listing.stamp or _stamp(listing.records), **asdict(options)}
    with work_folder(out.absolute(), plan, needed_bytes=listing.nbytes) as folder:
        records = listing.stage(folder) if listing.stage is not None else listing.records
        if not (folder / CUTS).is_file():
            write_json(folder / CUTS, _cut(listing, records, orders, options, workers))
        spots = find_spots(folder / CHUNKS, read_json(folder / CUTS))
        todo = [spot for spot in spots if read_chunk(spot.folder) is None]
        run = map or _choose_map(todo, workers)
        threads = workers if run is in_process else max(1, workers // max(1, len(todo)))
        chunks = _chunks(records, orders, todo, options, threads)
        with (
            telling(progress, _num_images(records, kind), folder / CHUNKS) as done,
            closing(run(write_chunk, chunks)) as results,
        ):
            before = done()
            sets, rejected = assemble(spots, {*todo}, results, listing.rejected, kind=kind, made=folder / MADE, out=out)
            rate = (done() - before) / (time.monotonic() - started)
        _keep_licences(str(source), folder / MADE)
        publish(folder / MADE, out)
    return PackSummary(sets, rejected, listing.ignored, listing.empty_classes, rate, len(spots) - len(todo))


def list_source(source: str | Path, kind: str) -> Listing:
    """The records in a folder by class, in a table or in tars. Raises ValueError when it is none of these."""
    source = str(source)
    if is_tars(source):
        return list_tars(source, kind)
    if is_table(source) and not os.path.isdir(source):
        return list_table(source, kind)
    if os.path.isfile(source):
        raise ValueError(f"{source!r} is neither a folder of images nor tars nor a table ({' '.join(TABLE_SUFFIXES)})")
    if kind != "labelled":
        raise ValueError(f"a folder by class is of kind 'labelled'; for {kind!r} give a table ({' '.join(TABLE_SUFFIXES)})")
    return list_remote_folder(source) if is_url(source) else list_folder(Path(source))


def _check(options: _Options, workers: int) -> None:
    require_kind(options.kind)
    if not 0.0 <= options.eval_fraction < 1.0:
        raise ValueError(f"--eval-fraction must be from 0 to below 1, got {options.eval_fraction}")
    if options.split not in SPLITS:
        raise ValueError(f"unknown split {options.split!r}; it is one of {', '.join(SPLITS)}")
    if options.sample.on:
        options.sample.check(options.kind)
        if options.kind != "labelled" and options.eval_fraction > 0:
            raise ValueError(
                "--sample with --eval-fraction would draw negatives over the border: pack the labelled images with "
                "--eval-fraction first, then draw from OUT/train and OUT/eval"
            )
    counts = {name: getattr(options, name) for name in ("max_shard_mb", "max_shard_records", "max_side", "run_rows")}
    for name, value in {**counts, "workers": workers}.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.quality is not None:
        if not 1 <= options.quality <= 100:
            raise ValueError(f"--quality must be from 1 to 100, got {options.quality}")
        if options.max_side is None and not options.reencode:
            raise ValueError("--quality is of JPEGs that are written anew: give --max-side or --reencode with it")


def _require_two_classes(records: Records, kind: str, where: str) -> None:
    if kind != "labelled":
        return
    classes = entity_names(records)
    if len(classes) < 2:
        only = f"only the class {classes[0]!r}" if classes else "no class"
        raise ValueError(f"{where} holds {only}: an embedding is learned by telling classes apart, so at least 2 are needed")


def _orders(records: Records, options: _Options) -> dict[str, Int64s]:
    """Data set -> its records in the order in which they are written."""
    entities = entity_numbers(records)
    parts: dict[str, Int64s] = {"all": np.arange(len(entities))}
    if options.eval_fraction > 0.0:
        train, held_out = split_records(entities, options.kind, options.eval_fraction, options.split, options.seed)
        parts = {"train": train, "eval": held_out}
    return {name: write_order(entities, rows, options.kind, options.run_rows, options.seed) for name, rows in parts.items()}


def _cut(
    listing: Listing, records: Records, orders: dict[str, Int64s], options: _Options, workers: int
) -> dict[str, list[int]]:
    measure = partial(estimate, kind=options.kind, sizes=listing.sizes, prepare=_prepare(options), threads=workers)
    transcodes = options.reencode or options.max_side is not None
    return {
        name: cut(measure(records, order, transcodes=transcodes), options.max_shard_mb * MB, options.max_shard_records)
        for name, order in orders.items()
    }


def _chunks(records: Records, orders: dict[str, Int64s], spots: list[Spot], options: _Options, threads: int) -> Iterator[Chunk]:
    """Made one by one, because together they hold all records."""
    numbers = {name: number for number, name in enumerate(entity_names(records))} if options.kind == "labelled" else {}
    for spot in spots:
        picked = [records[row] for row in orders[spot.part][spot.first : spot.end].tolist()]
        yield Chunk(
            folder=spot.folder,
            kind=options.kind,
            first=spot.first,
            records=picked,
            class_index={name: numbers[name] for record in picked if (name := record.entity) is not None and name in numbers},
            prepare=_prepare(options),
            max_bytes=options.max_shard_mb * MB,
            max_records=options.max_shard_records,
            threads=threads,
        )


def _prepare(options: _Options) -> Prepare:
    return partial(prepare, max_side=options.max_side, quality=options.quality or JPEG_QUALITY, reencode=options.reencode)


def _choose_map(todo: list[Spot], workers: int) -> Map:
    few = sum(spot.end - spot.first for spot in todo) <= FEW_RECORDS
    return in_process if workers == 1 or len(todo) == 1 or few else process_map(workers)


def _num_images(records: Records, kind: str) -> int:
    if kind == "triplet":  # the only kind in which records differ
        return sum(len(record.images) for record in records)
    return len(records) * len(MEMBERS[kind])


def _keep_licences(source: str, out: Path) -> None:
    """The licences that `nearfar fetch` has noted, for the model card."""
    if not is_url(source) and (Path(source) / LICENCES).is_file():
        shutil.copyfile(Path(source) / LICENCES, out / LICENCES)


def _stamp(records: Records) -> str:
    """For a source without a stamp: whatever its records say about themselves."""
    digest = sha256()
    for record in records:
        names = [image.name for image in record.images]
        digest.update(f"{names} {record.entity!r} {record.negative_entities} {record.match} {record.weight}\n".encode())
    return digest.hexdigest()
