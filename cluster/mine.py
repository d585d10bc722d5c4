"""`nearfar mine`: shards of triplets whose negatives are what an encoder takes for the anchor, out of a whole data set."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet
import torch

from cluster.embed import Place, embed, rejected_file
from cluster.embeddings import Embeddings
from cluster.hard_negatives import PICKS, POSITIVES, Choice, Images, Triplets, find_negatives, positives_of_class
from cluster.packing import Interrupted
from cluster.progress import bar
from pipelines.folders import require_free
from pipelines.hashing import Int64s
from pipelines.manifest import Manifest
from pipelines.mined import StoredImages, list_triplets
from pipelines.pack import pack
from pipelines.records import MAX_NEGATIVES, MEMBERS
from pipelines.remote import is_url
from pipelines.sources.fetched import LICENCES

KINDS = ("labelled", "pair")


@dataclass(frozen=True, slots=True)
class _Source:
    """The images of a data set: where they lie, their vectors, and the names of their groups."""

    stored: StoredImages
    images: Images
    groups: list[str]  # [C]
    members: Int64s  # [n] 0: anchor (or the only image), 1: positive
    records: Int64s  # [n]


def mine(
    model: str,
    shards: str,
    out: Path,
    *,
    choice: Choice,
    positives: str | None = None,
    per_image: int | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Write OUT, shards of kind `triplet`; returns the statistics.

    Of labelled data every image is an anchor, with `per_image` (1) positives of its class; of pairs every anchor is, with its
    own positive, and the positives of other groups are the candidates. `workers` processes embed and pack. A call that is
    stopped leaves OUT.vectors.parquet and OUT.partial behind, and the same call goes on there.
    Raises ValueError for bad input and when no triplet is left, RuntimeError when the disk is full, Interrupted at Ctrl-C.
    """
    began = time.monotonic()
    manifest = Manifest.open(shards)
    _check(manifest, choice, positives, per_image)
    require_free(out)
    vectors = out.absolute().with_name(f"{out.name}.vectors.parquet")
    embedded = embed(model, shards, vectors, place=Place(local=True, workers=workers))
    source = _read(manifest, vectors)
    _check_raw(source.images.raw, choice)
    anchor, positive, candidates = _pairs(manifest.kind, source, positives or "random", per_image or 1, choice.seed)
    with bar("mining", "pairs") as report:
        found = find_negatives(source.images, anchor, positive, candidates, choice, report)
    told = _told(source, anchor, found)
    if not len(found.anchor):
        kept = f"the vectors are kept in {vectors} for the next call"
        raise ValueError(f"no negative is left for any of {told['anchors']} anchors; {_loosen(choice)}; {kept}")
    _write(manifest, source, found, out, workers, choice.seed)
    for left in (vectors, rejected_file(vectors)):
        left.unlink(missing_ok=True)
    about = {"out": str(out), "model": embedded["model"], "source": embedded["source"], "kind": manifest.kind}
    return {**about, **told, "unreadable": embedded["rejected"], "seconds": round(time.monotonic() - began, 1)}


def describe(found: dict[str, Any]) -> str:
    """The statistics for a person."""
    unreadable = f"\nunreadable {found['unreadable']} images" if found["unreadable"] else ""
    alone = f"; {found['alone']} more have no positive" if found["alone"] else ""
    sign, what = (-1, "distances") if found["distance"] == "euclidean" else (1, "cosines  ")
    return (
        f"{found['out']}: {found['triplets']} triplets with {found['negatives']} negatives, in {found['seconds']} s\n"
        f"anchors    {found['anchors']}, for {found['nothing_left']:.1%} of them nothing was left{alone}\n"
        f"{what}  positive {sign * found['mean_s_ap']:.4f}, negative {sign * found['mean_s_an']:.4f} on average\n"
        f"hard       {found['hard']:.1%} of the negatives are nearer than the positive{unreadable}"
    )


def _check(manifest: Manifest, choice: Choice, positives: str | None, per_image: int | None) -> None:
    where = manifest.location
    if manifest.kind not in KINDS:
        raise ValueError(f"{where} is of kind {manifest.kind!r}; negatives are mined for {' and '.join(KINDS)} data")
    if manifest.has_vectors:
        raise ValueError(f"{where} has vectors or targets beside its images; negatives are mined among images only")
    if manifest.kind == "pair" and (positives is not None or per_image is not None):
        raise ValueError(f"--positives and --per-image are for labelled data; a pair of {where} has its own positive")
    labels = {label for shard in range(len(manifest.sizes)) for label in manifest.column(shard, "label")}
    if len(labels) == 1 and labels != {None}:
        raise ValueError(f"{where} holds only the class {labels.pop()!r}: negatives come from other classes")
    if positives is not None and positives not in POSITIVES:
        raise ValueError(f"--positives {positives}: it is one of {', '.join(POSITIVES)}")
    if positives == "all" and per_image is not None:
        raise ValueError("--positives all and --per-image exclude each other")
    if choice.pick not in PICKS:
        raise ValueError(f"--pick {choice.pick}: it is one of {', '.join(PICKS)}")
    if not 1 <= choice.negatives <= MAX_NEGATIVES:
        raise ValueError(f"--negatives {choice.negatives}: a triplet has 1 to {MAX_NEGATIVES}")
    if not 0 <= choice.skip < choice.depth or choice.depth - choice.skip < choice.negatives:
        raise ValueError(
            f"--depth {choice.depth} --skip {choice.skip} leaves {max(0, choice.depth - choice.skip)} candidates for "
            f"--negatives {choice.negatives}: raise --depth"
        )


def _check_raw(raw: bool, choice: Choice) -> None:
    given = [
        name for name, value in (("--max-ratio", choice.max_ratio), ("--max-score", choice.max_score)) if value is not None
    ]
    if raw and given:
        raise ValueError(f"{' and '.join(given)}: of cosines, but this model's vectors are raw; --margin is in distances then")


def _read(manifest: Manifest, vectors: Path) -> _Source:
    """What `embed` wrote. A pair without a group is a group of its own, called by its key."""
    table = pyarrow.parquet.read_table(vectors, columns=["key", "label", "member", "record"])
    if not len(table):
        raise ValueError(f"no image of {manifest.location} could be read; see `nearfar verify`")
    names = pc.coalesce(table["label"], table["key"]).combine_chunks().dictionary_encode()
    group = names.indices.to_numpy().astype(np.int64)
    members = np.asarray([MEMBERS[manifest.kind].index(name) for name in table["member"].to_pylist()], np.int64)
    records = table["record"].to_numpy().astype(np.int64)
    stored = StoredImages(manifest, records, members)
    read = Embeddings(vectors)
    rows = np.empty((read.num_rows, read.dim), np.float32)
    for start, part in read.vectors():
        rows[start : start + len(part)] = part
    images = Images(torch.from_numpy(rows), group, stored.uid, read.raw)
    return _Source(stored, images, names.dictionary.to_pylist(), members, records)


def _pairs(kind: str, source: _Source, positives: str, per_image: int, seed: int) -> tuple[Int64s, Int64s, Int64s]:
    """(anchor, positive) [P] each, and the candidates [c]."""
    if kind == "labelled":
        return *positives_of_class(source.images, positives, per_image, seed), np.arange(len(source.members))
    anchors, others = (np.flatnonzero(source.members == member) for member in (0, 1))
    _, left, right = np.intersect1d(source.records[anchors], source.records[others], assume_unique=True, return_indices=True)
    return anchors[left], others[right], others


def _write(manifest: Manifest, source: _Source, found: Triplets, out: Path, workers: int, seed: int) -> None:
    rows = np.concatenate([found.anchor[:, None], found.positive[:, None], found.negatives], axis=1)
    listing = list_triplets(source.stored, rows, source.groups, source.images.group, stamp=manifest.digest)
    try:
        with bar("writing", "images") as report:
            pack(manifest.location, out, kind="triplet", workers=workers, seed=seed, listing=listing, progress=report)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what is done is kept, the same command goes on there") from None
    here = Path(manifest.location)
    for place in () if is_url(manifest.location) else (here, here.parent):
        if (place / LICENCES).is_file() and not (out / LICENCES).exists():
            shutil.copyfile(place / LICENCES, out / LICENCES)


def _told(source: _Source, anchor: Int64s, found: Triplets) -> dict[str, Any]:
    anchors, there = len(np.unique(anchor)), found.negatives >= 0
    asked = len(source.members) if not source.members.any() else int((source.members == 0).sum())
    hard = (found.s_an > found.s_ap[:, None])[there]
    return {
        "triplets": len(found.anchor),
        "negatives": int(there.sum()),
        "anchors": anchors,
        "alone": asked - anchors,
        "nothing_left": 1 - len(np.unique(found.anchor)) / max(1, anchors),
        "mean_s_ap": float(found.s_ap.mean()) if len(hard) else None,
        "mean_s_an": float(found.s_an[there].mean()) if len(hard) else None,
        "hard": float(hard.mean()) if len(hard) else None,
        "distance": "euclidean" if source.images.raw else "cosine",
    }


def _loosen(choice: Choice) -> str:
    limits = {"--max-ratio": choice.max_ratio, "--max-score": choice.max_score, "--margin": choice.margin}
    given = [f"{name} {value}" for name, value in limits.items() if value is not None]
    if not given:
        return "a class needs two different images"
    return f"loosen {' or '.join(given)}, or raise --depth {choice.depth}"
