"""Cross-batch memory: embeddings of past steps, of all ranks, as further candidates (Wang et al. 2020, XBM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.ids import Ids

FIELDS = 6  # of Ids
NOBODY = -1  # record of what is remembered: no row of the batch shares it


class Memory(nn.Module):
    """The last `size` valid candidates, in the order of (step, uid): the same on every rank, whatever their number.

    They carry no gradient and need no collective. `start`: steps before they are used. All of it is in the state_dict.
    """

    def __init__(self, size: int, start: int = 0) -> None:
        super().__init__()
        if size < 1 or start < 0:
            raise ValueError(f"loss.memory: must be at least 1 and loss.memory_start at least 0, got {size} and {start}")
        self.size, self.start = size, start
        self.vectors: Tensor
        self.ids: Tensor
        self.steps: Tensor
        self.register_buffer("vectors", torch.zeros(0, 0))  # [at most size, D], oldest first
        self.register_buffer("ids", torch.zeros(0, FIELDS, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def candidates(self) -> tuple[Tensor, Ids] | None:
        """What is remembered, or None while it is not to be used."""
        if int(self.steps) < self.start or not len(self.ids):
            return None
        return self.vectors, Ids.unstack(self.ids)

    @torch.no_grad()
    def remember(self, vectors: Tensor, ids: Ids) -> None:
        """Append the valid rows of a step, [G, D] in `Ids.order`, and forget the oldest.

        Rows that are not finite are not remembered: a step that is left out must not spoil those after it.
        """
        columns = ids.stack()
        columns[:, 3] = NOBODY
        kept = (ids.valid == 1) & torch.isfinite(vectors).all(1)
        held = self.vectors.to(vectors).reshape(-1, vectors.shape[1])
        self.vectors = torch.cat([held, vectors.detach()[kept]])[-self.size :].clone()
        self.ids = torch.cat([self.ids.to(columns.device), columns[kept]])[-self.size :].clone()
        self.steps = self.steps + 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The queue grows until it is full, so its saved shape is the one to take.
        for name in ("vectors", "ids"):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
