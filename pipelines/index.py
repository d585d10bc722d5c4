"""Makes a manifest over webdataset tars that somebody else wrote; the tars stay as they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipelines.hashing import Int64s
from pipelines.index_files import choose_out, replaced_manifest, url_from
from pipelines.index_scan import Rejected, Scan, scan_tar
from pipelines.keys import repeated_keys
from pipelines.manifest import Manifest
from pipelines.manifest_writer import ManifestWriter
from pipelines.parallel import Map, in_process
from pipelines.records import require_kind
from pipelines.tar import TarError, TarReader
from pipelines.tar_records import TarRecord, infer_kind, is_text, read_records
from pipelines.tar_urls import expand_tars, open_tar

PEEK = 200  # records that decide which kind they are of
REJECTED = "rejected.jsonl"
Progress = Callable[[int, int | None], None]


@dataclass(slots=True)
class IndexSummary:
    """What became of the tars."""

    out: Path
    kind: str
    records: int = 0
    images: int = 0
    classes: int = 0
    shards: int = 0
    nbytes: int = 0
    longest_run: int = 0  # rows of one class in a row: the largest data.per_class
    rejected: list[Rejected] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)  # members that were not looked into, by what they are
    damaged: list[Rejected] = field(default_factory=list)  # tars of which the rest is missing

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out), "passed": dict(self.passed)}


def index(
    tars: Sequence[str | Path],
    *,
    out: Path | None = None,
    kind: str | None = None,
    salvage: bool = False,
    keys_per_tar: bool = False,
    map: Map = in_process,
    progress: Progress | None = None,
) -> IndexSummary:
    """Read all tars once and write their manifest to `out`, by default the folder they lie in.

    Records that lack something are left out and listed in OUT/rejected.jsonl. A manifest that `index` made of the first of
    these tars is replaced, all at once; any other one is refused. With `salvage` the records before the damage in a
    damaged tar are kept; with `keys_per_tar` the tar's name goes before each key, so that tars may repeat them.
    Raises ValueError, with nothing written, when a tar is damaged, keys repeat, or no record is of the kind.
    """
    urls = expand_tars(tars)
    out = choose_out(out, urls)
    kind = kind or infer_kind(islice(chain.from_iterable(_peek(url) for url in urls), PEEK))
    require_kind(kind)
    with replaced_manifest(out) as folder:
        writer, summary = ManifestWriter(folder, kind, made_by="index"), IndexSummary(out, kind)
        hashes: list[Int64s] = []
        for done, scan in enumerate(map(partial(scan_tar, kind=kind, keys_per_tar=keys_per_tar), urls), 1):
            _note(scan, summary)
            if scan.samples.num_rows:
                writer.add(url_from(out, scan.tar), scan.nbytes, scan.sha256, scan.samples)
                hashes.append(scan.key_hashes)
            if progress is not None:
                progress(done, len(urls))
        if not salvage:
            _require_sound(summary)
        if not writer.num_samples:
            raise ValueError(f"no record of kind {kind!r}; left out: {_listed([*summary.damaged, *summary.rejected])}")
        writer.finish()
        _require_unique(Manifest.open(folder), hashes)
        with (folder / REJECTED).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(one)) + "\n" for one in [*summary.damaged, *summary.rejected])
        summary.records, summary.images, summary.shards = writer.num_samples, writer.num_images, writer.num_shards
        summary.classes, summary.nbytes = len(writer.class_counts), writer.nbytes
    if kind == "labelled":
        summary.longest_run = int(Manifest.open(out).runs.length.max())
    return summary


def _peek(tar: str) -> Iterator[TarRecord]:
    """The first records; what is wrong with the tar is told later, together with the others."""
    with open_tar(tar) as file:
        try:
            yield from read_records(TarReader(file), is_text, Counter())
        except TarError:
            return


def _note(scan: Scan, summary: IndexSummary) -> None:
    summary.rejected += scan.rejected
    summary.passed.update(scan.passed)
    if scan.damage is not None:
        summary.damaged.append(scan.damage)


def _require_sound(summary: IndexSummary) -> None:
    if summary.damaged:
        raise ValueError(
            f"{len(summary.damaged)} tars cannot be read to their end: {_listed(summary.damaged)}. Fetch them again, leave "
            "them out, or keep what lies before the damage with --salvage"
        )


def _require_unique(manifest: Manifest, hashes: list[Int64s]) -> None:
    """Keys name records over all shards."""
    for key, places in repeated_keys(manifest, hashes):
        where = " and ".join(
            f"{manifest.shard_file(shard).name} at byte {manifest.column(shard, 'offset_record')[row]}" for shard, row in places
        )
        raise ValueError(
            f"the key {key!r} is in {where}; keys name records over all tars. If the records are different, --keys-per-tar "
            "puts the tar's name before each key"
        )


def _listed(what: Sequence[Rejected], most: int = 5) -> str:
    lines = [f"{one.shard} {one.key} at byte {one.offset}: {one.reason}".replace("  ", " ") for one in what[:most]]
    return "; ".join([*lines, "..."] if len(what) > most else lines)
