"""What a worker of `nearfar embed` does: a stretch of images in, their vectors as a part of the result out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cluster.context import device_of
from cluster.models import open_model
from cluster.weights import weights_digest
from configs.schema import Data
from pipelines.image_set import Name, Pixels, Span
from pipelines.images import open_images
from trainer.encoders.towers import Towers

REJECTED = b"rejected"
ANCHORS = ("", "anchor", "left")  # names of members that the anchor tower encodes; labelled images have none
NOT_FINITE = "its vector is not finite"
Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker must know. References and paths are absolute: workers run in other folders."""

    model: str
    uri: str  # of MLflow
    weights: str  # digest of the model's weights: a run that goes on, or an alias that moves, must not mix two models
    source: str
    digest: str  # of the source
    batch: int
    dim: int
    threads: int  # that read and decode
    torch_threads: int | None  # None: as it is
    gpu: bool


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a span, as an Arrow file with what was rejected in its metadata."""

    number: int
    data: bytes
    images: int  # that were looked at
    began: float  # seconds since the epoch


class Embedder:
    """Holds the model and the source; call it with a span."""

    def __init__(self, job: Job) -> None:
        """Raises ValueError when model or source are not those that the driver has seen."""
        if job.torch_threads is not None:
            torch.set_num_threads(job.torch_threads)
        self._job, self._device = job, device_of(0, gpu=job.gpu)
        model = open_model(job.model, uri=job.uri, device=self._device)
        self._images = open_images(job.source)
        if weights_digest(model) != job.weights:
            raise ValueError(f"{job.model} has changed since this began; name a checkpoint or a version that stays")
        if self._images.digest != job.digest:
            raise ValueError(f"{job.source} has changed since this began, or is another one on this node")
        self._module, self._raw = model.module, model.raw
        self._data: Data = model.data(job.source).model_copy(update={"threads": job.threads})

    def __call__(self, span: Span) -> Part:
        began = time.time()
        names: list[Name] = []
        rejected: list[tuple[Name, str]] = []
        vectors: list[Vectors] = [np.empty((0, self._job.dim), np.float32)]
        with torch.inference_mode():
            for pixels in self._images.pixels(span, self._data, self._job.batch):
                found = self._encode(pixels)[:, : self._job.dim].float()
                rows = (found if self._raw else F.normalize(found, dim=1)).cpu().numpy()
                good = np.isfinite(rows).all(axis=1)
                reasons = [
                    told or ("" if fine else NOT_FINITE) for told, fine in zip(pixels.reason, good.tolist(), strict=True)
                ]
                kept = [place for place, reason in enumerate(reasons) if not reason]
                names += [pixels.names[place] for place in kept]
                vectors.append(rows[kept])
                rejected += [(name, reason) for name, reason in zip(pixels.names, reasons, strict=True) if reason]
        data = _encode(names, np.concatenate(vectors), rejected)
        return Part(span.number, data, len(names) + len(rejected), began)

    def _encode(self, pixels: Pixels) -> torch.Tensor:
        """Vectors [k, D]; of towers each member's own."""
        images = pixels.images.to(self._device, non_blocking=True).contiguous()
        if not isinstance(self._module, Towers):
            found: torch.Tensor = self._module(images)
            return found
        other = torch.tensor([name.member not in ANCHORS for name in pixels.names], device=self._device)
        towered: torch.Tensor = self._module(images, other=other)
        return towered


@lru_cache(maxsize=1)
def _embedder(job: Job) -> Embedder:
    return Embedder(job)


def embed_span(job: Job, span: Span) -> Part:
    """For processes that are given one span after the other: the first opens the model."""
    return _embedder(job)(span)


def schema(dim: int) -> pa.Schema:
    """The columns of the result."""
    return pa.schema(
        {
            "key": pa.string(),
            "label": pa.string(),
            "member": pa.string(),
            "record": pa.int64(),
            "embedding": pa.list_(pa.float32(), dim),
        }
    )


def _encode(names: Sequence[Name], vectors: Vectors, rejected: Sequence[tuple[Name, str]]) -> bytes:
    dim = vectors.shape[1]
    columns = {
        "key": [name.key for name in names],
        "label": [name.label for name in names],
        "member": [name.member for name in names],
        "record": [name.record for name in names],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim),
    }
    lines = [{**name._asdict(), "reason": reason} for name, reason in rejected]
    kept = schema(dim).with_metadata({REJECTED: json.dumps(lines).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, kept) as writer:
        writer.write_table(pa.table(columns, schema=kept))
    data: bytes = sink.getvalue().to_pybytes()
    return data
