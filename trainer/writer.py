"""Checkpoints written beside the training: it stands still for the copy only, and for a write that is not done yet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints import About, Snapshot

logger = logging.getLogger(__name__)


class Writer:
    """Calls `write` in a thread, one snapshot at a time. As a context it ends when all is written, however it is left."""

    def __init__(self, write: Callable[[Snapshot, About], None]) -> None:
        self._write = write
        self._copy = HostCopy()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def submit(self, taken: Snapshot, about: About) -> None:
        """Copy the tensors and have them written. Waits for the write before, and raises what that raised."""
        self.wait()
        self._under_way = self._threads.submit(self._write, self._copy(taken), about)

    def wait(self) -> None:
        """Until all is written. Raises what writing raised, once."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # what ends the training already is the news
        finally:
            self._threads.shutdown()


class HostCopy:
    """Copies trees of tensors into memory of its own, which every call uses again: allocating it costs more than filling it."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, taken: Snapshot) -> Snapshot:
        copied = Snapshot(*(self._tree((part,), getattr(taken, part)) for part in ("modules", "optimizer", "random")))
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return copied

    def _tree(self, place: tuple[Any, ...], found: Any) -> Any:
        if isinstance(found, Tensor):
            return self._tensor(place, found.detach())
        if isinstance(found, dict):
            return {key: self._tree((*place, key), value) for key, value in found.items()}
        if isinstance(found, (list, tuple)):
            return type(found)(self._tree((*place, i), value) for i, value in enumerate(found))
        return found

    def _tensor(self, place: tuple[Any, ...], found: Tensor) -> Tensor:
        held = self._held.get(place)
        if held is None or held.shape != found.shape or held.dtype != found.dtype:
            # The files of weights hold rows one behind the other; an optimizer's moments lie as its weights do.
            layout = torch.contiguous_format if place[0] == "modules" else torch.preserve_format
            held = torch.empty_like(found, device="cpu", pin_memory=found.is_cuda, memory_format=layout)
            self._held[place] = held
        return held.copy_(found, non_blocking=True)
