"""What is in a data set, from its manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.hashing import Int64s
from pipelines.manifest import Manifest
from pipelines.records import MEMBERS
from pipelines.samples import TARGET
from pipelines.tar_urls import open_tar

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
SAMPLED = 1000  # images that are opened to see what they are
_MAGIC = {
    b"\xff\xd8": "JPEG",
    b"RIFF": "WebP",
    b"\x93NUMPY": "vector",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_LARGEST = 2**20  # values above count as this much


@dataclass(slots=True)
class Contents:
    """Counts and quantiles of a data set. `quantiles` are of images, by what is measured, named as in QUANTILES."""

    path: str
    kind: str
    made_by: str
    digest: str
    records: int
    images: int
    distinct_images: int
    bad: int  # records that the manifest calls bad
    vectors: int  # in place of images
    vector_dim: int
    targets: int
    target_dim: int
    nbytes: int
    shards: dict[str, int] = field(default_factory=dict)
    quantiles: dict[str, dict[str, float]] = field(default_factory=dict)
    formats: dict[str, float] = field(default_factory=dict)  # share of the images sampled
    classes: dict[str, Any] = field(default_factory=dict)  # labelled data
    groups: dict[str, int] = field(default_factory=dict)  # the other kinds
    negatives: dict[str, int] = field(default_factory=dict)  # triplets: records by how many they have
    matches: int | None = None  # labelled pairs
    weights: dict[str, float] = field(default_factory=dict)  # where any is not 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(manifest: Manifest) -> Contents:
    """Reads the tables of all shards, and the first bytes of some images. Raises RuntimeError when they cannot be read."""
    tally = _Tally(manifest.kind)
    for shard in range(len(manifest.sizes)):
        tally.add(manifest, shard)
    uids = np.concatenate([np.empty(0, np.int64), *tally.uids])
    contents = Contents(
        path=manifest.location,
        kind=manifest.kind,
        made_by=manifest.made_by,
        digest=manifest.digest,
        records=manifest.num_samples,
        images=len(uids),
        distinct_images=len(np.unique(uids)),
        bad=tally.bad,
        vectors=tally.vectors,
        vector_dim=manifest.vector_dim,
        targets=tally.targets,
        target_dim=manifest.target_dim,
        nbytes=int(manifest.nbytes.sum()),
        shards=_shards(manifest),
        quantiles={name: quantiles_of(counts) for name, counts in tally.histograms.items() if counts.any()},
        formats=_formats(manifest),
        matches=tally.matches if manifest.kind == "labelled_pair" else None,
    )
    if manifest.kind == "labelled":
        contents.classes = _classes(manifest)
    else:
        groups, counts = np.unique(np.concatenate([np.empty(0, np.int64), *tally.groups]), return_counts=True)
        contents.groups = {"groups": len(groups), "records_in_the_largest": int(counts.max(initial=0))}
    if manifest.kind == "triplet":
        contents.negatives = {str(count): records for count, records in sorted(tally.negatives.items())}
    if manifest.weighted:
        weights = np.concatenate(tally.weights)
        contents.weights = {"min": float(weights.min()), "mean": float(weights.mean()), "max": float(weights.max())}
    return contents


def quantiles_of(counts: Int64s) -> dict[str, float]:
    """Lower quantiles of whole numbers, of which `counts[v]` are v."""
    upto = np.cumsum(counts)
    return {name: int(np.searchsorted(upto, max(1, np.ceil(q * upto[-1])))) for name, q in QUANTILES.items()}


class _Tally:
    """Sums over shards; of each image it keeps 8 bytes, of each record 12."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.bad = self.vectors = self.targets = self.matches = 0
        self.uids: list[Int64s] = []
        self.groups: list[Int64s] = []
        self.weights: list[NDArray[np.float32]] = []
        self.negatives = Counter[int]()
        self.histograms = {name: np.zeros(_LARGEST + 1, np.int64) for name in ("width", "height", "kilobytes")}

    def add(self, manifest: Manifest, shard: int) -> None:
        table = manifest.table(shard)
        images = table.dim == 0
        for name, values in (("width", table.width), ("height", table.height), ("kilobytes", -(-table.size // 1024))):
            self.histograms[name] += np.bincount(np.clip(values[images], 0, _LARGEST), minlength=_LARGEST + 1)
        self.uids.append(table.uid[images])
        self.groups.append(table.group[table.start[:-1]])
        self.weights.append(table.weight)
        targets, others = int((table.view == TARGET).sum()), len(MEMBERS[self.kind]) + (manifest.target_dim > 0)
        self.negatives.update((np.diff(table.start) - others).tolist())
        self.vectors += int((~images).sum()) - targets
        self.targets += targets
        self.bad += int(table.bad.sum())
        self.matches += int((table.match == 1).sum())


def _shards(manifest: Manifest) -> dict[str, int]:
    mean = round(manifest.num_samples / max(1, len(manifest.sizes)))
    largest, smallest = (int(of(manifest.nbytes)) for of in (np.max, np.min))
    return {"count": len(manifest.sizes), "mean_records": mean, "largest_bytes": largest, "smallest_bytes": smallest}


def _classes(manifest: Manifest) -> dict[str, Any]:
    names, counts = manifest.classes.names, manifest.classes.counts
    order = np.argsort(-counts, kind="stable")
    return {
        "count": len(names),
        "largest": {names[i]: int(counts[i]) for i in order[:5]},
        "smallest": {names[i]: int(counts[i]) for i in order[::-1][:5]},
        "singles": int((counts == 1).sum()),
        "longest_run": int(manifest.runs.length.max(initial=0)),
        "images_per_class": quantiles_of(np.bincount(np.minimum(counts, _LARGEST))),
    }


def _formats(manifest: Manifest) -> dict[str, float]:
    """Of images spread evenly over the data set, by how their bytes begin."""
    picked = np.unique(np.linspace(0, manifest.num_samples - 1, SAMPLED).round().astype(np.int64))
    shards = np.searchsorted(manifest.starts, picked, side="right") - 1
    found = Counter[str]()
    for shard in np.unique(shards).tolist():
        table = manifest.table(shard)
        with open_tar(manifest.shard_file(shard).location) as file:
            for row in (picked[shards == shard] - manifest.starts[shard]).tolist():
                file.seek(int(table.offset[table.start[row]]))
                begin = file.read(8)
                found[next((name for magic, name in _MAGIC.items() if begin.startswith(magic)), "other")] += 1
    return {name: count / len(picked) for name, count in found.most_common()}
