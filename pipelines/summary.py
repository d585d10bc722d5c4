"""What became of a source that was packed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.manifest_writer import ManifestWriter
from pipelines.work import Discard


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
    images_per_s: float = 0.0  # that this call looked at
    resumed_chunks: int = 0  # that an earlier call had finished

    @property
    def records(self) -> int:
        return sum(part.records for part in self.sets.values())

    @property
    def images(self) -> int:
        return sum(part.images for part in self.sets.values())

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.sets.values())

    @property
    def left_out(self) -> dict[str, int]:
        """Kind of reason -> number of images, the most frequent first."""
        kinds = Counter(re.sub(r"\d+", "N", reason.partition(":")[0]) for _, reason in self.rejected)
        return dict(kinds.most_common())


def summarize(written: ManifestWriter, path: Path, rejected: list[tuple[str, str]]) -> SetSummary:
    """Raises Discard when too little was left over to train with."""
    if not written.num_samples:
        example = f"; the first: {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise Discard(f"{path.name!r} would have no readable image in it{example}")
    classes = written.class_counts
    if written.kind == "labelled" and len(classes) < 2:
        raise Discard(
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
