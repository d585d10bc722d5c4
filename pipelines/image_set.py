"""What can be embedded: images with names, in an order, a stretch of which can be read at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from configs.schema import Data
from pipelines.records import Record


class Name(NamedTuple):
    """What is known of an image: the number of its record in the source, key, class or group, and which member it is."""

    record: int
    key: str
    label: str | None
    member: str  # anchor, positive, ...; empty for labelled images


@dataclass(frozen=True, slots=True)
class Span:
    """Records `first` to `end` of a source. Those of a folder or table travel with it, those of shards are read by number."""

    number: int
    first: int
    end: int
    records: tuple[Record, ...] = ()


class Pixels(NamedTuple):
    """Some images as evaluation sees them. `names` [k]; `reason` [k] is why an image could not be read, and else empty."""

    images: Tensor  # uint8 [k, 3, S, S]
    names: Sequence[Name]
    reason: Sequence[str]


class ImageSet(Protocol):
    """A source of images. `kind` of its records; `digest` differs once it has changed."""

    location: str
    kind: str
    digest: str
    num_records: int
    num_images: int  # about, for progress

    def span(self, number: int, first: int, end: int) -> Span: ...

    def pixels(self, span: Span, data: Data, batch: int) -> Iterator[Pixels]:
        """A span's images in order, about `batch` at a time. Vectors in place of images are passed over."""

    def read(self, record: int, member: str) -> bytes:
        """One image file. Raises ValueError, OSError or RuntimeError when it is not to be had any more."""
