"""Labelled images as pairs and triplets, or with vectors beside them: another listing of what a source holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.columns import ColumnRecords, ImageColumn, entity_names, entity_numbers
from pipelines.hashing import Int64s
from pipelines.nearby import neighbour_pairs, thumbnails
from pipelines.records import ImageFile, Listing, Record, Records
from pipelines.relevance import relevance_triplets
from pipelines.sampling import Classes, labelled_pairs, other_classes, pairs, triplets
from pipelines.sources.given_vectors import GivenVectors, read_vectors
from pipelines.sources.lists import MemoryFile
from pipelines.vectors import encode_vector

STRATEGIES = {
    "labelled": (),
    "pair": ("random",),
    "labelled_pair": ("random", "neighbours"),
    "triplet": ("random", "near", "far", "relevance"),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """How pairs and triplets are drawn from labelled images.

    `strategy`: `random` rows of the right classes (labelled pairs: as many that match as that do not); `near`, `far`: negative
    classes by the cosine of their vectors; `relevance`: Deep Ranking's triplets (see `relevance_triplets`); `neighbours`: the
    nearest by vectors, or by pixels without, whatever the class (see `neighbour_pairs`). Each image is an
    anchor `per_image` times. `vectors`: a file (see `read_vectors`); of labelled images they become the targets, of relevance
    they are the features, else the class's vector takes the place of the positive image, and another's of the negative.
    """

    strategy: str | None = None
    vectors: str | None = None
    per_image: int = 1
    limit: int | None = None

    @property
    def on(self) -> bool:
        return self != Sample()

    def check(self, kind: str) -> None:
        """Raise ValueError for what cannot be drawn."""
        known = STRATEGIES[kind]
        if self.strategy is not None and self.strategy not in known:
            raise ValueError(
                f"--sample {self.strategy} is not for --kind {kind}; "
                + (f"there is {', '.join(known)}" if known else "it is for pair, labelled_pair and triplet")
            )
        if self.strategy in ("near", "far", "relevance") and self.vectors is None:
            raise ValueError(f"--sample {self.strategy} goes by vectors: give --vectors FILE, too")
        if self.strategy is None and self.per_image != 1:
            raise ValueError("--per-image is for pairs and triplets: give --kind and --sample, too")
        if self.strategy is None and known:
            raise ValueError(f"--kind {kind} out of labelled images: say how to draw, for instance --sample random")
        for name, value in (("--per-image", self.per_image), ("--limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def draw(listing: Listing, kind: str, sample: Sample, seed: int) -> Listing:
    """The records of `kind` that `sample` draws from a listing of labelled images; what has no vector is rejected.

    Raises ValueError when there is nothing to draw.
    """
    given = None if sample.vectors is None else read_vectors(sample.vectors)
    kept, rows, rejected = _with_a_vector(listing.records, given)
    if sample.limit is not None:
        few = Classes(entity_numbers(_Some(listing.records, kept))).few(sample.limit, seed)
        kept, rows = kept[few], rows[few] if len(rows) else rows

    drawing, stage = _Drawing(_Some(listing.records, kept), given, rows, sample, seed), listing.stage
    drawn = drawing.records(kind)
    if not len(drawn):
        raise ValueError("no class has two images, so nothing can be drawn")
    return replace(
        listing,
        records=drawn,
        nbytes=listing.nbytes * -(-len(drawn) // len(listing.records)),
        rejected=(*listing.rejected, *rejected),
        sizes=None,
        stamp=f"{listing.stamp} {sample} {seed} {given.stamp if given else ''}",
        stage=None if stage is None else lambda folder: drawing.over(_Some(stage(folder), kept)).records(kind),
    )


def _with_a_vector(base: Records, given: GivenVectors | None) -> tuple[Int64s, Int64s, list[tuple[str, str]]]:
    """Records that have one, their rows in the file, and the names of the others."""
    if given is None:
        return np.arange(len(base)), np.zeros(0, np.int64), []
    names, labels = [record.name for record in base], entity_names(base)
    rows = given.of_images(names, [labels[code] for code in entity_numbers(base).tolist()])
    without = [(names[index], f"no vector in {given.path}") for index in np.flatnonzero(rows < 0).tolist()]
    return np.flatnonzero(rows >= 0), rows[rows >= 0], without


class _Some:
    """Some of the records."""

    def __init__(self, base: Records, kept: Int64s) -> None:
        self._base, self._kept = base, kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int, /) -> Record:
        return self._base[int(self._kept[index])]

    def __iter__(self) -> Iterator[Record]:
        return map(self.__getitem__, range(len(self)))


class _Drawing:
    """Labelled images `base` [n] with the rows [n] of their vectors, if any are given."""

    def __init__(self, base: Records, given: GivenVectors | None, rows: Int64s, sample: Sample, seed: int) -> None:
        self._base, self._given, self._rows, self._sample, self._seed = base, given, rows, sample, seed
        self._names, self._codes = entity_names(base), entity_numbers(base)

    def over(self, base: Records) -> _Drawing:
        """The same draws over the same images at another place."""
        moved = copy.copy(self)
        moved._base = base
        return moved

    @cached_property
    def _neighbours(self) -> tuple[Int64s, NDArray[np.int8]]:
        of_images = thumbnails(self._base) if self._given is None else self._given.vectors[self._rows]
        return neighbour_pairs(of_images, self._sample.per_image, self._seed)

    @cached_property
    def _by_relevance(self) -> Int64s:
        """Deep Ranking's triplets: relevance is the cosine of the vectors within a category, which is the label by default."""
        assert self._given is not None
        category = self._codes
        if self._given.categories is not None:
            of_image = [self._given.categories[row] for row in self._rows.tolist()]
            number = {name: index for index, name in enumerate(sorted(set(of_image)))}
            category = np.asarray([number[name] for name in of_image], np.int64)
        count = self._sample.per_image * len(self._base)
        return relevance_triplets(self._given.vectors[self._rows], category, count, seed=self._seed)

    def records(self, kind: str) -> ColumnRecords:
        if kind == "labelled":
            everything = np.arange(len(self._base))
            target = None if self._given is None else self._vectors(self._rows)
            return ColumnRecords(len(everything), [self._images(everything)], entities=self._labels(everything), target=target)
        if self._given is not None and self._sample.strategy not in ("relevance", "neighbours"):
            return self._beside_vectors(kind)
        match: NDArray[np.int8] | None = None
        if self._sample.strategy == "relevance":
            rows = self._by_relevance
        elif self._sample.strategy == "neighbours":
            rows, match = self._neighbours
        elif kind == "labelled_pair":
            rows, match = labelled_pairs(self._codes, self._sample.per_image, self._seed)
        else:
            rows = (pairs if kind == "pair" else triplets)(self._codes, self._sample.per_image, self._seed)
        columns = [self._images(rows[:, member]) for member in range(rows.shape[1])]
        negatives = self._names_of(self._codes[rows[:, 2]]) if kind == "triplet" else None
        labels = None if self._sample.strategy == "neighbours" else self._labels(rows[:, 0])
        return ColumnRecords(len(rows), columns, entities=labels, match=match, negative_entities=negatives)

    def _beside_vectors(self, kind: str) -> ColumnRecords:
        """Images with the vector of their class, and of another class."""
        if self._given is None or self._given.by != "label":
            raise ValueError(
                f"--vectors {self._sample.vectors}: a vector for each class is needed, columns label and embedding"
            )
        own = np.zeros(len(self._names), np.int64)  # [C] rows of the file
        own[self._codes] = self._rows
        if len(self._names) < 2:
            raise ValueError(
                f"--vectors {self._sample.vectors}: only the class {self._names[0]!r} has a vector; at least 2 are needed"
            )
        anchors = np.repeat(np.arange(len(self._base)), self._sample.per_image)
        codes, images = self._codes[anchors], self._images(anchors)
        if kind == "pair":
            mine = self._vectors(own[codes])
            return ColumnRecords(len(anchors), [images, mine], entities=self._labels(anchors), target=mine)
        other = other_classes(self._given.vectors[own], codes, self._sample.strategy or "random", self._seed)
        if kind == "triplet":
            columns = [images, self._vectors(own[codes]), self._vectors(own[other])]
            negatives = self._names_of(other)
            return ColumnRecords(len(anchors), columns, entities=self._labels(anchors), negative_entities=negatives)
        left, match = np.repeat(anchors, 2), np.tile(np.asarray([1, 0], np.int8), len(anchors))
        right = np.stack([own[codes], own[other]], 1).reshape(-1)
        columns = [self._images(left), self._vectors(right)]
        return ColumnRecords(len(left), columns, entities=self._labels(left), match=match)

    def _images(self, rows: Int64s) -> ImageColumn:
        return lambda index: self._base[int(rows[index])].images[0]

    def _vectors(self, rows: Int64s) -> ImageColumn:
        given = self._given
        assert given is not None

        def file(index: int) -> ImageFile:
            row = int(rows[index])
            return MemoryFile(f"{given.path}:{given.names[row]}", encode_vector(given.vectors[row]))

        return file

    def _names_of(self, codes: Int64s) -> Callable[[int], tuple[str, ...]]:
        return lambda index: (self._names[int(codes[index])],)

    def _labels(self, rows: Int64s) -> pa.DictionaryArray:
        codes = pa.array(self._codes[rows].astype(np.int32))
        return pa.DictionaryArray.from_arrays(codes, pa.array(self._names, pa.large_string()))
