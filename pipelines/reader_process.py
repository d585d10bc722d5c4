"""A loader in a process of its own, which hands its batches over.

here  -> there   True: the next batch, please; the end of the connection: enough
there -> here    what goes with the images, then the descriptor of the memory they lie in where it is new; or what went wrong
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from multiprocessing import reduction, resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.schema import Data
from pipelines.batch import Batch
from pipelines.mixture import open_sources
from pipelines.stream import Loader

JOIN_S = 10.0  # how long it may take to end: longer than a loader waits for its threads


@dataclass(frozen=True, slots=True)
class _Told:
    """A batch but for its images, and what the loader has counted so far."""

    columns: Mapping[str, Any]  # field of Batch -> array or None
    shape: tuple[int, ...]  # of the images, channels last
    new_bytes: int  # of the shared memory, whose descriptor follows; 0: it is the one from before
    counts: dict[str, float]


class ReaderProcess:
    """Its first batch is asked for at once. What the loader refuses comes in place of the first batch."""

    def __init__(self, data: Data, options: Mapping[str, Any]) -> None:
        """A Loader over `data.train` with these `options`, which are pickled."""
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_serve, args=(theirs, data, dict(options)), name="nearfar-reader")
        resource_tracker.ensure_running()  # its start would let the signals in again
        # Ctrl-C and SIGTERM may reach all processes of a job, and are for the rank: it ends this one when it has saved.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._memory: mmap.mmap | None = None
        self._end = util.Finalize(self, _end, args=(self._connection, self.process), exitpriority=0)
        self.ask()

    def ask(self) -> None:
        """For the next batch; the images of the last one are no longer good."""
        with suppress(BrokenPipeError):  # what it has said before it went is received first
            self._connection.send(True)

    def receive(self) -> tuple[Batch, dict[str, float]]:
        """The batch that was asked for, and the loader's counts.

        Raises what the loader raised, and RuntimeError when the process is gone.
        """
        try:
            told = self._connection.recv()
            if isinstance(told, Exception):
                raise told
            return self._batch(told), told.counts
        except (EOFError, ConnectionResetError) as error:
            self.close()
            raise RuntimeError(f"a process that reads the data has ended (exit code {self.process.exitcode})") from error

    def dismiss(self) -> None:
        """Tell the process to end; what it read ahead is forgotten."""
        self._connection.close()

    def close(self) -> None:
        """End the process, and wait for that."""
        self._end()

    def _batch(self, told: _Told) -> Batch:
        if told.new_bytes:
            descriptor = reduction.recv_handle(self._connection)
            self._memory = mmap.mmap(descriptor, told.new_bytes)
            os.close(descriptor)
        images = torch.from_numpy(np.ndarray(told.shape, np.uint8, self._memory)).permute(0, 3, 1, 2)
        columns = {name: None if column is None else torch.from_numpy(column) for name, column in told.columns.items()}
        return Batch(images=images, **columns)  # type: ignore[arg-type]


def _end(connection: Connection, process: BaseProcess) -> None:
    connection.close()
    process.join(JOIN_S)
    if process.exitcode is None:
        process.kill()
        process.join()


def _serve(connection: Connection, data: Data, options: dict[str, Any]) -> None:
    """What the process does until the other side has had enough."""
    os.dup2(2, 1)  # stdout is the driver's, for a result
    memory: mmap.mmap | None = None
    try:
        with Loader(open_sources(data.train, data.cache), data, **options) as loader:
            while connection.recv():
                batch = next(loader)
                pixels = batch.images.permute(0, 2, 3, 1).numpy()
                new_bytes, descriptor = 0, -1
                if memory is None or len(memory) < pixels.nbytes:
                    new_bytes = max(1, pixels.nbytes)
                    memory, descriptor = _new_memory(new_bytes)
                np.copyto(np.ndarray(pixels.shape, np.uint8, memory), pixels)
                connection.send(_Told(_columns(batch), pixels.shape, new_bytes, loader.counts))
                if new_bytes:
                    reduction.send_handle(connection, descriptor, None)
                    os.close(descriptor)
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        with suppress(OSError):
            connection.send(_portable(error))


def _new_memory(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Memory to share, and its descriptor. It has no name, so the system frees it with the last process that has it."""
    descriptor = os.memfd_create("nearfar-images")
    os.ftruncate(descriptor, num_bytes)
    return mmap.mmap(descriptor, num_bytes), descriptor


def _columns(batch: Batch) -> dict[str, Any]:
    rest: dict[str, Tensor | None] = {f.name: getattr(batch, f.name) for f in fields(Batch) if f.name != "images"}
    return {name: None if tensor is None else tensor.numpy() for name, tensor in rest.items()}


def _portable(error: Exception) -> Exception:
    """The error itself if it can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
