"""Packs a folder, a table or tars of images into shards with a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.folders import fresh_folder, require_free
from pipelines.parallel import ordered_map
from pipelines.prepare import PackedImage, prepare
from pipelines.records import Listing, Record, require_kind
from pipelines.shards import ShardWriter
from pipelines.sources.folder import list_folder
from pipelines.sources.table import TABLE_SUFFIXES, list_table
from pipelines.sources.tars import list_tars
from pipelines.split import split_records, write_order
from pipelines.tar_urls import is_tars

Progress = Callable[[int, int | None], None]
REJECTED = "rejected.jsonl"
SPLITS = ("class", "record")


@dataclass(frozen=True, slots=True)
class SetSummary:
    """One data set that was written."""

    path: Path
    records: int
    images: int
    classes: int
    single_image_classes: int  # of which no two images can be compared
    shards: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PackSummary:
    """What became of a source. `sets` holds `train` and `eval`, or only `all`."""

    sets: dict[str, SetSummary]
    rejected: list[tuple[str, str]] = field(default_factory=list)  # image, reason
    ignored: int = 0  # files that are hidden or no images
    empty_classes: tuple[str, ...] = ()

    @property
    def records(self) -> int:
        return sum(part.records for part in self.sets.values())

    @property
    def images(self) -> int:
        return sum(part.images for part in self.sets.values())


@dataclass(frozen=True, slots=True)
class _Prepared:
    record: Record
    images: list[PackedImage]
    rejected: list[tuple[str, str]]


def pack(
    source: str | Path,
    out: Path,
    *,
    kind: str = "labelled",
    eval_fraction: float = 0.0,
    split: str = "class",
    max_shard_mb: int = 256,
    max_side: int | None = None,
    workers: int = 1,
    seed: int = 0,
    run_rows: int = 64,
    progress: Progress | None = None,
) -> PackSummary:
    """Write OUT, or OUT/train and OUT/eval when `eval_fraction` is above 0; every image is really decoded on the way.

    Images that cannot be decoded are left out and listed, in the summary and in OUT/rejected.jsonl. The same input and seed
    give the same bytes. Raises ValueError for bad input, with nothing written; RuntimeError when the disk is full.
    """
    source, out = Path(source), Path(out)
    _check_options(kind, eval_fraction, split, max_shard_mb, max_side, workers, run_rows)
    require_free(out)
    listing = list_source(source, kind)
    _require_two_classes(listing.records, kind, f"{str(source)!r}")
    everything = np.arange(len(listing.records))
    parts = {"all": everything}
    if eval_fraction > 0.0:
        parts["train"], parts["eval"] = split_records(listing.records, kind, eval_fraction, split, seed)
        del parts["all"]
    rejected = list(listing.rejected)
    sets: dict[str, SetSummary] = {}
    count = _counter(progress, len(everything))
    with fresh_folder(out, needed_bytes=listing.nbytes) as folder:
        for name, indices in parts.items():
            order = write_order(listing.records, indices, kind, run_rows, seed)
            records = (listing.records[i] for i in order.tolist())
            prepared = ordered_map(partial(_prepare, max_side=max_side), records, workers)
            names = sorted({record.entity or "" for record in listing.records}) if kind == "labelled" else []
            writer = ShardWriter(_below(folder, name), kind, max_shard_bytes=max_shard_mb * 2**20, class_names=names)
            _write(writer, prepared, rejected, count)
            sets[name] = _summarize(writer, _below(out, name), rejected)
        with (folder / REJECTED).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"image": image, "reason": reason}) + "\n" for image, reason in rejected)
    return PackSummary(sets, rejected, listing.ignored, listing.empty_classes)


def list_source(source: Path, kind: str) -> Listing:
    """The records in a folder by class, in a table or in tars. Raises ValueError when it is none of these."""
    if is_tars(source):
        return list_tars(source, kind)
    if source.suffix in TABLE_SUFFIXES and not source.is_dir():
        return list_table(source, kind)
    if source.is_file():
        raise ValueError(f"{str(source)!r} is neither a folder of images nor tars nor a table ({' '.join(TABLE_SUFFIXES)})")
    if kind != "labelled":
        raise ValueError(f"a folder by class is of kind 'labelled'; for {kind!r} give a table ({' '.join(TABLE_SUFFIXES)})")
    return list_folder(source)


def _check_options(
    kind: str, eval_fraction: float, split: str, max_shard_mb: int, max_side: int | None, workers: int, run_rows: int
) -> None:
    require_kind(kind)
    if not 0.0 <= eval_fraction < 1.0:
        raise ValueError(f"--eval-fraction must be from 0 to below 1, got {eval_fraction}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
    for name, value in (("max-shard-mb", max_shard_mb), ("max-side", max_side), ("workers", workers), ("run-rows", run_rows)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")


def _require_two_classes(records: Iterable[Record], kind: str, where: str) -> None:
    if kind != "labelled":
        return
    classes = {record.entity for record in records}
    if len(classes) < 2:
        only = f"only the class {next(iter(classes))!r}" if classes else "no class"
        raise ValueError(f"{where} holds {only}: an embedding is learned by telling classes apart, so at least 2 are needed")


def _prepare(record: Record, *, max_side: int | None) -> _Prepared:
    images, rejected = [], []
    for image in record.images:
        try:
            images.append(prepare(image.read(), max_side=max_side))
        except FileNotFoundError:
            rejected.append((image.name, "no such file"))
        except (OSError, ValueError) as error:
            rejected.append((image.name, str(error)))
    return _Prepared(record, images, rejected)


def _write(
    writer: ShardWriter, prepared: Iterator[_Prepared], rejected: list[tuple[str, str]], count: Callable[[], None]
) -> None:
    """One bad image rejects its whole record: half a pair teaches nothing."""
    with writer:
        for item in prepared:
            if item.rejected:
                rejected += item.rejected
            else:
                writer.write(item.record, item.images)
            count()


def _summarize(writer: ShardWriter, path: Path, rejected: list[tuple[str, str]]) -> SetSummary:
    """Raises ValueError when too little was left over to train with."""
    written = writer.manifest
    if not written.num_samples:
        example = f"; the first: {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise ValueError(f"{path.name!r} would have no readable image in it{example}")
    classes = written.class_counts
    if writer.kind == "labelled" and len(classes) < 2:
        raise ValueError(
            f"{path.name!r} would have readable images of only the class {next(iter(classes))!r}; "
            f"at least 2 classes are needed, and {len(rejected)} images could not be read"
        )
    return SetSummary(
        path=path,
        records=written.num_samples,
        images=written.num_images,
        classes=len(classes),
        single_image_classes=sum(count == 1 for count in classes.values()),
        shards=written.num_shards,
        nbytes=written.nbytes,
    )


def _below(folder: Path, name: str) -> Path:
    return folder if name == "all" else folder / name


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return count
