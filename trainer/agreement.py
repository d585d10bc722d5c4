"""What one rank wishes, all do at the same step: save, because a machine is about to go, or save and stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum

import torch

from trainer import collectives

EVERY_S = 0.5  # between two times that the ranks ask each other; on GPUs each costs a sync
MOST_STEPS = 100


class Wish(IntEnum):
    """In the order of urgency."""

    NONE = 0
    SAVE = 1
    STOP = 2


class Agreement:
    """Asks for this rank's wish about twice a second, at steps that are the same on every rank."""

    def __init__(self, wish: Callable[[], Wish], step: int, device: torch.device) -> None:
        """step: the last one that is done."""
        self._wish, self._device = wish, device
        self._step, self._time, self._next = step, time.perf_counter(), step + 1

    def at(self, step: int) -> Wish:
        """The most urgent wish of any rank. Collective: every rank calls it at every step."""
        if step < self._next:
            return Wish.NONE
        now = time.perf_counter()
        pace = max((now - self._time) / (step - self._step), 1e-9)
        ahead = max(1, min(MOST_STEPS, int(EVERY_S / pace)))
        found = torch.tensor([self._wish(), -ahead], dtype=torch.int64, device=self._device)
        wish, slowest = collectives.largest(found).tolist()
        self._step, self._time, self._next = step, now, step - slowest
        return Wish(wish)
