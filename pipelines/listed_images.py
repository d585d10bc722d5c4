"""The images of a folder or a table, in its order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from configs.schema import Augment, Data
from pipelines.batch import NUM_DRAWS
from pipelines.chunks import num_threads
from pipelines.crop import cut
from pipelines.fill import single_core_threads
from pipelines.image_set import Name, Pixels, Span
from pipelines.records import MEMBERS, ImageFile, Listing, member_names
from pipelines.urls import Answers

NUMBERS = b"\x93NUMPY"  # how a vector begins that stands in the place of an image
Loaded = tuple[Tensor | None, Exception | None]  # pixels; or what went wrong; or neither, for a vector


class ListedImages:
    """An ImageSet over what `list_folder` or `list_table` has found."""

    def __init__(self, location: str, kind: str, listing: Listing) -> None:
        self.location, self.kind, self.digest = location, kind, listing.stamp
        self._records = listing.records
        self.num_records = len(listing.records)
        self.num_images = self.num_records * len(MEMBERS[kind])

    def span(self, number: int, first: int, end: int) -> Span:
        return Span(number, first, end, tuple(self._records[row] for row in range(first, end)))

    def pixels(self, span: Span, data: Data, batch: int) -> Iterator[Pixels]:
        images = _images(self.kind, span)
        answers = Answers()
        pool = single_core_threads(num_threads(list(span.records), data.threads))
        coming: deque[tuple[Name, ImageFile, Future[Loaded]]] = deque()

        def ask(count: int) -> None:
            coming.extend((name, image, pool.submit(_load, image, data)) for name, image in islice(images, count))

        try:
            ask(data.prefetch * batch)
            while coming:
                here = [coming.popleft() for _ in range(min(batch, len(coming)))]
                found = [(name, image, *future.result()) for name, image, future in here]
                ask(len(here))
                for _, image, _, error in found:
                    answers.note(image, error)
                if any(pixels is not None or error is not None for *_, pixels, error in found):
                    yield _stacked([(name, pixels, error) for name, _, pixels, error in found], data.image_size)
        finally:
            pool.shutdown()
        answers.require()  # else a store that has just gone down would cost the images it did not give

    def read(self, record: int, member: str) -> bytes:
        found = self._records[record]
        return found.images[member_names(self.kind, len(found.images)).index(member)].read()


def _images(kind: str, span: Span) -> Iterator[tuple[Name, ImageFile]]:
    for number, record in enumerate(span.records, span.first):
        for member, image in zip(member_names(kind, len(record.images)), record.images, strict=True):
            yield Name(number, record.name, record.entity or None, member), image


def _load(image: ImageFile, data: Data) -> Loaded:
    try:
        file = image.read()
        if file.startswith(NUMBERS):
            return None, None
        return cut(file, np.zeros(NUM_DRAWS, np.float32), data, Augment()), None
    except (OSError, ValueError) as error:
        return None, error


def _stacked(found: list[tuple[Name, Tensor | None, Exception | None]], side: int) -> Pixels:
    kept = [(name, pixels, error) for name, pixels, error in found if pixels is not None or error is not None]
    blank = torch.zeros((3, side, side), dtype=torch.uint8)
    images = torch.stack([blank if pixels is None else pixels for _, pixels, _ in kept])
    return Pixels(images, [name for name, *_ in kept], [_reason(error) for *_, error in kept])


def _reason(error: Exception | None) -> str:
    if error is None:
        return ""
    return "no such file" if isinstance(error, FileNotFoundError) else str(error)
