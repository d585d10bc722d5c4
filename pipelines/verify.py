"""Reads all of a data set and lists everything that is not as it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from pipelines.hashing import hash_entity
from pipelines.keys import repeated_keys
from pipelines.manifest import Manifest
from pipelines.parallel import Map, in_process
from pipelines.remote import is_url
from pipelines.samples import SCHEMA, SHARDS_SCHEMA
from pipelines.verify_shard import Fault, ShardCheck, check_shard

Progress = Callable[[int, int | None], None]


@dataclass(slots=True)
class Verdict:
    """What was read, and what is wrong with it."""

    records: int = 0
    images: int = 0
    shards: int = 0
    nbytes: int = 0
    num_bad: int = 0  # records that the manifest calls bad: known, and not looked at
    faults: list[Fault] = field(default_factory=list)


def verify(path: str | Path, *, map: Map = in_process, progress: Progress | None = None) -> Verdict:
    """Compare every byte of the data set in `path` with its manifest, and decode every image.

    Raises ValueError when there is no manifest.json at all; everything else that is wrong is a fault.
    """
    verdict = Verdict()
    if is_url(str(path)):
        damaged: list[Fault] = []  # its tables are fetched only when they are read
        Manifest.open(path)
    else:
        if not (Path(path) / "manifest.json").is_file():
            Manifest.open(path)  # tells what to do
        damaged = list(_damaged_tables(Path(path)))
    verdict.faults += damaged
    try:
        manifest = Manifest.open(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        verdict.faults.append(Fault("manifest.json", "", 0, f"{error}"))
        return verdict
    checks: list[ShardCheck] = []
    for found in map(partial(check_shard, path=str(path)), range(len(manifest.sizes))):
        checks.append(found)
        verdict.faults += found.faults
        verdict.images, verdict.nbytes = verdict.images + found.images, verdict.nbytes + found.nbytes
        verdict.num_bad += found.num_bad
        found.faults = []
        if progress is not None:
            progress(len(checks), len(manifest.sizes))
    verdict.records, verdict.shards = manifest.num_samples, len(manifest.sizes)
    if not damaged:
        verdict.faults += [*_repeated(manifest, checks), *_wrong_sums(manifest, checks)]
    verdict.faults += _strangers(manifest)
    return verdict


def _damaged_tables(path: Path) -> Iterator[Fault]:
    """By the checksums that the writer put into the tables."""
    for file in [path / "shards.parquet", path / "runs.parquet", path / "classes.parquet", *sorted(path.glob("samples/*"))]:
        try:
            table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            schema = SHARDS_SCHEMA if file.name == "shards.parquet" else SCHEMA
            if file.name not in ("runs.parquet", "classes.parquet") and not table.schema_arrow.equals(schema):
                yield Fault(file.relative_to(path).as_posix(), "", 0, "the table has other columns than it should have")
            for number in range(table.num_row_groups):
                table.read_row_group(number)
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            yield Fault(file.relative_to(path).as_posix(), "", 0, f"the table cannot be read: {reason}")


def _repeated(manifest: Manifest, checks: list[ShardCheck]) -> Iterator[Fault]:
    for key, ((first, first_row), (shard, row)) in repeated_keys(manifest, [check.key_hashes for check in checks]):
        offset, before = (manifest.column(n, "offset_record")[at] for n, at in ((shard, row), (first, first_row)))
        reason = f"the key is also in {manifest.shard_file(first).name} at byte {before}"
        yield Fault(manifest.shard_file(shard).name, key, offset, reason)


def _wrong_sums(manifest: Manifest, checks: list[ShardCheck]) -> Iterator[Fault]:
    """Totals, classes and runs, compared with those of the samples. What could not be read has a fault of its own."""
    all_runs = [check.runs for check in checks if check.runs is not None]
    if len(all_runs) < len(checks):
        return
    sums = {"num_samples": sum(len(check.key_hashes) for check in checks), "num_images": sum(c.num_images for c in checks)}
    for name in ("vector_dim", "target_dim"):
        sums[name] = max((getattr(check, name) for check in checks), default=0)
    for name, there in sums.items():
        if there != getattr(manifest, name):
            yield Fault("manifest.json", "", 0, f"{name} is {getattr(manifest, name)}, but the tables have {there}")
    counts = sum((check.classes for check in checks), Counter[str]())
    names, groups = sorted(counts), [hash_entity(name) for name in sorted(counts)]
    classes = manifest.classes
    told = (classes.names, classes.groups.tolist(), classes.counts.tolist())
    if told != (names, groups, [counts[name] for name in names]):
        yield Fault("classes.parquet", "", 0, "the classes or their counts are not those of the samples")
    runs = [np.column_stack([np.full(len(one), shard), one]) for shard, one in enumerate(all_runs)]
    told_runs = np.column_stack([manifest.runs.shard, manifest.runs.start, manifest.runs.length])
    if not np.array_equal(np.concatenate(runs), told_runs):
        yield Fault("runs.parquet", "", 0, "the runs of one class are not those of the samples")


def _strangers(manifest: Manifest) -> Iterator[Fault]:
    """Shards that nobody would read. Tars that were made elsewhere may have others beside them, and a URL cannot be listed."""
    known = {manifest.shard_file(shard).name for shard in range(len(manifest.sizes))}
    if manifest.made_by != "pack" or is_url(manifest.location):
        return
    for file in sorted(manifest.path.glob("*.tar")):
        if file.name not in known:
            yield Fault(file.name, "", 0, "the manifest does not have this shard")
