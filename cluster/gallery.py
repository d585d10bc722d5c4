"""The evaluation set of a run as its encoder sees it: encoded images, classes and vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cluster.building import EVALUATION_BATCH, plain
from configs.schema import RunConfig
from pipelines.manifest import Manifest
from pipelines.read import Reader
from pipelines.stream import evaluation_batches
from trainer.evaluate import Embedded, embed
from trainer.report.data import Neighbour, Sheet


class Gallery:
    """All images of `data.eval`, embedded on the CPU by one process; of vectors among its records there is nothing to show."""

    def __init__(self, config: RunConfig, encoder: nn.Module) -> None:
        assert config.data.eval is not None
        self.data = config.data
        self.manifest = Manifest.open(config.data.eval, cache=config.data.cache)
        batches = evaluation_batches(self.manifest, config.data, batch=EVALUATION_BATCH)
        self.found: Embedded = _images(self.manifest, embed(encoder, batches, plain(torch.device("cpu"), torch.float32)))

    def some(self, number: int) -> list[bytes]:
        """At most `number` encoded images, evenly spread over the set."""
        size = len(self.found.group)
        return [self.image(i * size // min(number, size)) for i in range(min(number, size))]

    def sheets(self, number: int, neighbours: int) -> list[Sheet]:
        """Queries spread evenly over those that have something to find, with their nearest neighbours."""
        _, inverse, members = torch.unique(self.found.group, return_inverse=True, return_counts=True)
        queries = (members[inverse] > 1).nonzero()[:, 0]
        chosen = queries[torch.arange(min(number, len(queries))) * len(queries) // max(1, min(number, len(queries)))]
        scores = self.found.vectors[chosen] @ self.found.vectors.T  # [q, N]
        scores.scatter_(1, chosen[:, None], -torch.inf)
        cosine, nearest = scores.topk(min(neighbours, scores.shape[1] - 1), dim=1)
        return [self._sheet(int(q), nearest[i].tolist(), cosine[i].tolist()) for i, q in enumerate(chosen)]

    def image(self, index: int) -> bytes:
        """The encoded bytes of one image."""
        shard, row, view = self.found.sample[index].tolist()
        table, reader = self.manifest.table(shard), Reader(self.manifest, self.data)
        first, end = int(table.start[row]), int(table.start[row + 1])
        at = first + int((table.view[first:end] == view).argmax())
        try:
            return reader.read(shard, int(table.offset[at]), int(table.size[at]), int(table.crc32[at]))
        finally:
            reader.close()

    def _label(self, index: int) -> str:
        shard, row, _ = self.found.sample[index].tolist()
        return self.manifest.class_names.get(int(self.found.group[index])) or self.manifest.keys(shard)[row]

    def _sheet(self, query: int, nearest: Sequence[int], cosine: Sequence[float]) -> Sheet:
        group = self.found.group
        hits = [
            Neighbour(self.image(i), self._label(i), score, bool(group[i] == group[query]))
            for i, score in zip(nearest, cosine, strict=True)
        ]
        return Sheet(self.image(query), self._label(query), hits)


def _images(manifest: Manifest, found: Embedded) -> Embedded:
    """Without the rows that are given as vectors."""
    if not manifest.vector_dim:
        return found
    keep = torch.zeros(len(found.sample), dtype=torch.bool)
    for shard in torch.unique(found.sample[:, 0]).tolist():
        table, here = manifest.table(shard), found.sample[:, 0] == shard
        # The view of a member is its place in the record.
        member = torch.from_numpy(table.start)[found.sample[here, 1]] + found.sample[here, 2]
        keep[here] = torch.from_numpy(table.dim)[member] == 0
    return Embedded(found.vectors[keep], found.group[keep], found.sample[keep])
