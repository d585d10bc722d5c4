"""The evaluation set of a run as its encoder sees it: encoded images, classes and vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from cluster.building import EVALUATION_BATCH, plain
from configs.schema import RunConfig
from pipelines.manifest import Manifest
from pipelines.read import Reader
from pipelines.records import member_names
from pipelines.samples import TARGET
from pipelines.stream import evaluation_batches
from trainer.evaluate import Embedded, embed
from trainer.report.contact import lighter
from trainer.report.insight import Picture
from trainer.report.names import reader

MOST_RECORDS = 20_000  # of the set; of a larger one every second, third, ... stretch of EVALUATION_BATCH


class Gallery:
    """The images of `data.eval` (and vectors in their place), embedded by one process. Shards stay open until `close`."""

    def __init__(self, config: RunConfig, encoder: nn.Module) -> None:
        assert config.data.eval is not None
        self.data = config.data
        self.manifest = Manifest.open(config.data.eval, cache=config.data.cache)
        self.device = torch.device("cuda" if config.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu")
        self.stride = -(-self.manifest.num_samples // MOST_RECORDS)
        self._reader = Reader(self.manifest, self.data)
        self._columns: dict[tuple[int, str], list[str | None]] = {}
        self._pictures: dict[int, Picture] = {}
        self._unread: dict[tuple[str, int], Mapping[str, Any]] = {}
        self.found: Embedded = self.embed(encoder)

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    def embed(self, encoder: nn.Module) -> Embedded:
        """All that can be read, on the CPU; the rows and their order are the same for any encoder."""
        note = self._note_unread
        batches = evaluation_batches(self.manifest, self.data, world=self.stride, batch=EVALUATION_BATCH, on_bad=note)
        found = embed(encoder.to(self.device), batches, plain(self.device, torch.float32))
        encoder.cpu()
        return Embedded(found.vectors.cpu(), found.group.cpu(), found.sample.cpu(), raw=found.raw)

    @property
    def unread(self) -> list[Mapping[str, Any]]:
        """What could not be read: shard, key, source, offset and reason of each."""
        return list(self._unread.values())

    def _note_unread(self, row: Mapping[str, Any]) -> None:
        self._unread[row["shard"], row["offset"]] = row

    @property
    def group(self) -> Tensor:
        return self.found.group

    @cached_property
    def shown(self) -> Tensor:
        """[N] whether a row is an image, not a vector."""
        shown = torch.ones(len(self.found.group), dtype=torch.bool)
        for shard in torch.unique(self.found.sample[:, 0]).tolist() if self.manifest.vector_dim else ():
            table, here = self.manifest.table(shard), self.found.sample[:, 0] == shard
            # The view of a member is its place in the record.
            member = torch.from_numpy(table.start)[self.found.sample[here, 1]] + self.found.sample[here, 2]
            shown[here] = torch.from_numpy(table.dim)[member] == 0
        return shown

    def some(self, number: int) -> list[bytes]:
        """At most `number` encoded images, evenly spread over the set."""
        rows = self.shown.nonzero()[:, 0].tolist()
        return [self.image(rows[i * len(rows) // min(number, len(rows))]) for i in range(min(number, len(rows)))]

    def image(self, row: int) -> bytes:
        """The encoded bytes of one image."""
        shard, record, view = self.found.sample[row].tolist()
        table = self.manifest.table(shard)
        first, end = int(table.start[record]), int(table.start[record + 1])
        at = first + int((table.view[first:end] == view).argmax())
        return self._reader.read(shard, int(table.offset[at]), int(table.size[at]), int(table.crc32[at]))

    def picture(self, row: int) -> Picture:
        if row not in self._pictures:
            self._pictures[row] = Picture(lighter(self.image(row)) if self.shown[row] else None, self._label(row))
        return self._pictures[row]

    def name_of(self, group: int) -> str:
        """The class, or what the first of its images is called."""
        return self._label(int((self.found.group == group).nonzero()[0, 0]))

    def given(self) -> tuple[Tensor, Tensor]:
        """Pairs of rows [p, 2], [n, 2] that records give as positive and as negative; of labelled images none."""
        none = torch.empty((0, 2), dtype=torch.int64)
        if self.manifest.kind == "labelled":
            return none, none
        sample, group = self.found.sample, self.found.group
        step = torch.ones(len(sample), dtype=torch.bool)
        step[1:] = (sample[1:, :2] != sample[:-1, :2]).any(1)
        first = step.nonzero()[:, 0][step.cumsum(0) - 1]  # [N] the first row of each row's record
        pairs = torch.stack([first, torch.arange(len(sample))], dim=1)[~step & (sample[first, 2] == 0)]
        same = group[pairs[:, 0]] == group[pairs[:, 1]]
        return pairs[same], pairs[~same]

    @cached_property
    def _read(self) -> Callable[[str], str]:
        return reader(self.manifest.class_names.values())

    def _label(self, row: int) -> str:
        shard, record, view = self.found.sample[row].tolist()
        name = self.manifest.class_names.get(int(self.found.group[row]))
        if name is not None:
            return self._read(name)
        table = self.manifest.table(shard)
        of_record = self._column(shard, "label")[record]
        first = int(table.start[record])
        if of_record is not None and int(self.found.group[row]) == int(table.group[first]):
            return str(of_record)
        num_images = int((table.view[first : int(table.start[record + 1])] != TARGET).sum())
        member = member_names(self.manifest.kind, num_images)[view]
        return f"{self._column(shard, 'key')[record]} {member}"

    def _column(self, shard: int, name: str) -> list[str | None]:
        if (shard, name) not in self._columns:
            self._columns[shard, name] = self.manifest.column(shard, name)
        return self._columns[shard, name]
