"""Several data sets as one: what every source holds, under shard numbers of the whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.schema import Source
from pipelines.hashing import Int64s, hash_bytes, hash_entity, hash_ints
from pipelines.manifest import Classes, Manifest, Runs, ShardFile
from pipelines.records import MAX_NEGATIVES
from pipelines.samples import ShardTable

_TAG_NAMESPACE = 31
NUMBERS_PER_SOURCE = 2**40  # records; so that a source's numbers do not move when another one grows


class Mixture(Manifest):
    """The shards of all `parts`, one source after the other; `weights` [S] are their shares of the stream.

    `group` numbers are the parts' own, hashed with their namespaces: sources share classes and groups only where they have
    the same one. `uid` numbers are left alone: the same image in two sources is the same image.
    """

    def __init__(self, parts: Sequence[Manifest], sources: Sequence[Source]) -> None:
        """Raises ValueError when the parts are not of one kind, or their vectors or targets not of one length."""
        _require_one_kind(parts)
        _require_one_length(parts)
        about = {
            "kind": parts[0].kind,
            "digest": hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest(),
            "num_samples": sum(part.num_samples for part in parts),
            "num_images": sum(part.num_images for part in parts),
            "num_classes": 0,
            "weighted": any(part.weighted for part in parts),
            "vector_dim": parts[0].vector_dim,
            "target_dim": parts[0].target_dim,
        }
        shards = pa.concat_tables(part._shards for part in parts)
        super().__init__(" + ".join(part.location for part in parts), about, shards, parts[0]._files)
        self.parts = tuple(parts)
        self.weights = [source.weight for source in sources]
        self.first_shards = np.cumsum([0, *(len(part.sizes) for part in parts)])  # [S + 1]
        self.numbers = np.concatenate([part.numbers + i * NUMBERS_PER_SOURCE for i, part in enumerate(parts)])
        # A name that the config cannot give stands for a source of its own.
        self._own_space = [hash_bytes(f"\0{i}".encode()) for i in range(len(parts))]
        self._space = [
            own if source.namespace is None else hash_bytes(source.namespace.encode())
            for own, source in zip(self._own_space, sources, strict=True)
        ]
        self.num_classes = len(self.classes.names)

    @cached_property
    def runs(self) -> Runs:
        """Runs of one class. Only labelled data has them."""
        runs = [part.runs for part in self.parts]
        shard = [of_part.shard + first for of_part, first in zip(runs, self.first_shards.tolist(), strict=False)]
        start, length = [r.start for r in runs], [r.length for r in runs]
        return Runs(np.concatenate(shard), np.concatenate(start), np.concatenate(length))

    @cached_property
    def classes(self) -> Classes:
        """Classes of all sources; in different namespaces two of them may have the same name."""
        names = np.concatenate([np.asarray(part.classes.names, dtype=object) for part in self.parts])
        groups, first, inverse = np.unique(np.concatenate(self._class_groups), return_index=True, return_inverse=True)
        counts = np.zeros(len(groups), dtype=np.int64)
        np.add.at(counts, inverse, np.concatenate([part.classes.counts for part in self.parts]))
        order = np.lexsort((groups, names[first].astype(str)))
        return Classes(names[first][order].tolist(), groups[order], counts[order])

    @property
    def class_shares(self) -> NDArray[np.float64]:
        """The share of the stream that shows each class.  [C]"""
        order = np.argsort(self.classes.groups)
        shares = np.zeros(self.num_classes)
        for part, groups, weight in zip(self.parts, self._class_groups, self.weights, strict=True):
            place = order[np.searchsorted(self.classes.groups, groups, sorter=order)]
            shares[place] += weight / sum(self.weights) * part.classes.counts / part.num_samples
        return shares

    @cached_property
    def _class_groups(self) -> list[Int64s]:
        return [_in_space(space, part.classes.groups) for space, part in zip(self._space, self.parts, strict=True)]

    def shard_file(self, shard: int) -> ShardFile:
        """Where the shard lies and what it was when it was packed."""
        part = self._part(shard)
        return self.parts[part].shard_file(shard - int(self.first_shards[part]))

    def _samples_at(self, shard: int) -> tuple[Path, int]:
        part = self._part(shard)
        return self.parts[part]._samples_at(shard - int(self.first_shards[part]))

    def _part(self, shard: int) -> int:
        return int(np.searchsorted(self.first_shards, shard, side="right")) - 1

    def _read_table(self, shard: int) -> ShardTable:
        table, part = super()._read_table(shard), self._part(shard)
        group = _in_space(self._space[part], table.group)
        if self.kind != "labelled" and self._space[part] != self._own_space[part]:
            # A record without a group has its key for one, and keys are only unique within a source.
            own = _key_groups(self.keys(shard), table)
            group = np.where(own, _in_space(self._own_space[part], table.group), group)
        return replace(table, group=group)


def open_sources(sources: Sequence[Source], cache: str | None = None) -> Manifest:
    """The data set that a config's `data.train` names. Raises ValueError as `Manifest.open` and Mixture do."""
    parts = [Manifest.open(source.path, cache=cache) for source in sources]
    if len(parts) == 1 and sources[0].namespace is None:
        return parts[0]
    return Mixture(parts, sources)


def parts_of(manifest: Manifest) -> tuple[Manifest, ...]:
    """The data sets that `manifest` is made of: itself, or the parts of a mixture."""
    return manifest.parts if isinstance(manifest, Mixture) else (manifest,)


def class_shares(manifest: Manifest) -> NDArray[np.float64]:
    """The share of the stream that shows each class of labelled data.  [C]"""
    return manifest.class_shares if isinstance(manifest, Mixture) else manifest.classes.counts / manifest.num_samples


def _in_space(space: int, groups: Int64s) -> Int64s:
    return (hash_ints(_TAG_NAMESPACE, space, groups) >> np.uint64(1)).astype(np.int64)


def _key_groups(keys: Sequence[str], table: ShardTable) -> NDArray[np.bool_]:
    """Which images have a group that is made of their record's key.  [m]"""
    ends = ("", "/right", *(f"/negative{i}" for i in range(MAX_NEGATIVES)))
    own = np.asarray([[hash_entity(f"\0{key}{end}") for end in ends] for key in keys], dtype=np.int64)  # [n, ends]
    record = np.repeat(np.arange(len(keys)), np.diff(table.start))
    return np.asarray((own[record] == table.group[:, None]).any(axis=1))


def _require_one_kind(parts: Sequence[Manifest]) -> None:
    if len({part.kind for part in parts}) > 1:
        seen = ", ".join(f"{part.location!r} {part.kind}" for part in parts)
        raise ValueError(f"sources of one run must be of one kind, but these are not: {seen}; pack them with the same --kind")


def _require_one_length(parts: Sequence[Manifest]) -> None:
    for name, dims in {"vectors": [p.vector_dim for p in parts], "targets": [p.target_dim for p in parts]}.items():
        if len(set(dims)) > 1:
            seen = ", ".join(f"{part.location!r} {dim or 'none'}" for part, dim in zip(parts, dims, strict=True))
            raise ValueError(f"sources of one run must have {name} of one length, but these have: {seen}; train on them apart")
