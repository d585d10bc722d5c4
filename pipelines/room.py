"""Room for what the members of a plan hold, until all is there and it becomes a batch."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch
from pipelines.plan import Plan
from pipelines.samples import TARGET
from pipelines.vectors import Vector


class Buffers:
    """Arrays that are used again once nobody holds them: the first touch of fresh pages costs a tenth of the decoding."""

    def __init__(self, most: int) -> None:
        """`most`: how many are kept for later."""
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=most)

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor uint8 with anything in it, which comes back by itself with the last tensor that shares its memory."""
        array = self._free.popleft() if self._free else None
        if array is None or array.shape != shape:
            array = np.empty(shape, dtype=np.uint8)
        held = array.view()  # dies with the tensor's memory, while `array` lives on
        weakref.finalize(held, self._free.append, array).atexit = False
        return torch.from_numpy(held)


class Room:
    """Images [k, 3, S, S], vectors [m, E] and targets [R, E] of a plan; several threads may write different members."""

    def __init__(self, plan: Plan, buffers: Buffers, side: int, vector_dim: int, target_dim: int) -> None:
        """Images are not initialised: every one has to be written or cleared."""
        self._plan = plan
        self._is_target = plan.view == TARGET
        self._slot = None if plan.dim is None else _slots(plan.dim, self._is_target, plan.record)
        num_vectors = 0 if plan.dim is None else int(((plan.dim > 0) & ~self._is_target).sum())
        num_images = plan.num_members - int(self._is_target.sum()) - num_vectors
        # Channels last, as they are decoded: the device turns a whole batch at once for less.
        self._images = buffers.take((num_images, side, side, 3)).permute(0, 3, 1, 2)
        self._vectors = np.zeros((num_vectors, vector_dim), np.float32) if vector_dim else None
        self._target = np.zeros((len(plan.sample), target_dim), np.float32) if target_dim else None

    def image(self, index: int) -> Tensor:
        """Where member `index`, an image, is to be written.  uint8 [3, S, S], channels last"""
        return self._images[index if self._slot is None else int(self._slot[index])]

    def put_numbers(self, index: int, numbers: Vector | int) -> None:
        """Member `index`, a vector or a target, is this [E]."""
        place = self._target if self._is_target[index] else self._vectors
        assert place is not None
        assert self._slot is not None
        place[self._slot[index]] = numbers

    def clear(self, index: int) -> None:
        """All zeros: a member that is not there or could not be read."""
        if self._plan.dim is None or not self._plan.dim[index]:
            self.image(index).zero_()
        else:
            self.put_numbers(index, 0)

    def batch(self, bad: Sequence[int]) -> Batch:
        """`bad`: members that could not be read."""
        plan = self._plan
        valid = plan.present.copy()
        valid[list(bad)] = False
        spoiled = np.zeros(len(plan.sample), dtype=bool)  # one bad member spoils its record
        spoiled[plan.record[~valid]] = True
        valid &= ~spoiled[plan.record]
        columns = {"group": plan.group, "uid": plan.uid, "view": plan.view, "record": plan.record, "valid": valid}
        draws = plan.draws
        if plan.dim is not None:
            columns = {name: column[~self._is_target] for name, column in columns.items()}
            draws = draws[plan.dim == 0]
        return Batch(
            images=self._images,
            draws=torch.from_numpy(draws),
            sample=torch.from_numpy(plan.sample),
            match=_tensor(plan.match),
            weight=_tensor(plan.weight),
            vectors=_tensor(self._vectors),
            place=_tensor(self._place()),
            target=None if self._target is None else torch.from_numpy(self._target[columns["record"]]),
            **{name: torch.from_numpy(column) for name, column in columns.items()},
        )

    def _place(self) -> NDArray[np.int64] | None:
        """As in Batch: images first, then vectors."""
        if self._vectors is None:
            return None
        assert self._plan.dim is not None
        assert self._slot is not None
        behind = np.where(self._plan.dim > 0, len(self._images), 0)
        place: NDArray[np.int64] = (self._slot + behind)[~self._is_target]
        return place


def _slots(dim: NDArray[np.int64], is_target: NDArray[np.bool_], record: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of each member among those that are what it is: images, vectors, or targets, of which each record has one.  [n]"""
    is_image, is_vector = dim == 0, (dim > 0) & ~is_target
    slot = np.where(is_image, np.cumsum(is_image), np.cumsum(is_vector)) - 1
    return np.where(is_target, record, slot)


def _tensor(values: NDArray[np.generic] | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)
