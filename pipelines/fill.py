"""Carries a plan out: reads and decodes its images, in threads and ahead of time, in the order of the plans."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from configs.schema import Augment, Data
from pipelines.batch import Batch
from pipelines.blocks import Counts
from pipelines.crop import cut, cut_decoded
from pipelines.decoded import Decoded
from pipelines.manifest import Manifest
from pipelines.plan import Plan
from pipelines.read import Reader
from pipelines.room import Buffers, Room
from pipelines.threads import Threads
from pipelines.vectors import decode_vector

T = TypeVar("T")
IMAGES_PER_TASK = 16


@dataclass(frozen=True, slots=True)
class Bad:
    """An image or a vector that could not be used: its index in the plan, and why."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Filled:
    """A plan carried out."""

    plan: Plan
    batch: Batch
    bad: list[Bad]


@dataclass(frozen=True, slots=True)
class _Started:
    plan: Plan
    room: Room
    parts: list[Future[list[Bad]]]


class Filler:
    """An iterator of filled plans, `prefetch` of them ahead of the consumer.

    `plans` makes the next plan each time it is called, from one thread at a time and in order; StopIteration ends it.
    What goes wrong in a thread is raised by `next`. `wait_s` is how long the consumer has waited so far.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: Data,
        augment: Augment,
        plans: Iterator[Callable[[], Plan]],
        decoded: Decoded | None = None,
    ) -> None:
        """`decoded`: where images are looked up, and kept for the next epoch."""
        self.data, self.augment = data, augment
        self.wait_s = 0.0
        self._manifest, self._plans = manifest, plans
        self._reader = Reader(manifest, data)
        self._buffers, self._decoded = Buffers(data.prefetch + 1), decoded or Decoded(0, manifest.num_images)
        self._planner = single_core_threads(1, "plan")  # apart from the pool, so that fetching starts early
        self._pool = single_core_threads(data.threads)
        self._ahead: deque[Future[_Started]] = deque()
        self._closed = False
        self._pid = os.getpid()

    def __iter__(self) -> Filler:
        return self

    def __next__(self) -> Filled:
        """Raises RuntimeError when nothing at all gets done for `data.timeout_s`, and whatever a thread ran into."""
        if self._closed or self._pid != os.getpid():
            raise RuntimeError("the loader is closed, or was made before this process was forked; make a new one")
        while len(self._ahead) < self.data.prefetch and (plan := next(self._plans, None)) is not None:
            self._ahead.append(self._planner.submit(self._start, plan))
        if not self._ahead:
            raise StopIteration
        started = time.perf_counter()
        try:
            work = self._result(self._ahead.popleft())
            bad = [bad for part in work.parts for bad in self._result(part)]
        except BaseException:
            self.close()
            raise
        self.wait_s += time.perf_counter() - started
        return Filled(work.plan, work.room.batch([one.index for one in bad]), bad)

    @property
    def counts(self) -> Counts:
        """What was read so far."""
        return self._reader.counts

    def close(self) -> None:
        """Stop the threads and close the files; what was read ahead is forgotten. A read that hangs is left behind."""
        self._closed = True
        for threads in (self._planner, self._pool):
            threads.shutdown()
        self._ahead.clear()
        self._reader.close()

    def _result(self, future: Future[T]) -> T:
        watch, patience, began = self._reader.watch, self.data.timeout_s, time.monotonic()
        while not future.done():
            left = max(watch.last, began) + patience - time.monotonic()
            if left <= 0:
                raise RuntimeError(f"no data for {patience:g} s (data.timeout_s); waiting longest for {watch.longest()}")
            wait([future], timeout=left)
        return future.result()

    def _start(self, make: Callable[[], Plan]) -> _Started:
        with self._reader.watch.busy("the tables of the manifest", 0):
            plan = make()
        room = Room(plan, self._buffers, self.data.image_size, self._manifest.vector_dim, self._manifest.target_dim)
        for index in np.flatnonzero(~plan.present).tolist():  # `_fill` writes the rest
            room.clear(index)
        parts = []
        for start in range(0, plan.num_members, IMAGES_PER_TASK):
            few = np.arange(start, min(start + IMAGES_PER_TASK, plan.num_members))
            here = few[plan.present[few]]
            lie = zip(plan.shard[here].tolist(), plan.offset[here].tolist(), strict=True)
            missing = here[[self._decoded.get(place) is None for place in lie]]
            where = (column[missing].tolist() for column in (plan.shard, plan.offset, plan.size))
            coming = self._reader.prefetch(*where)
            parts.append(self._pool.submit(self._fill, plan, room, here.tolist(), coming, after=coming))
        return _Started(plan, room, parts)

    def _fill(self, plan: Plan, room: Room, indices: list[int], fetched: list[Future[None]]) -> list[Bad]:
        for block in fetched:
            block.result()  # raises what went wrong with it
        bad = []
        for index in indices:
            try:
                self._put(plan, room, index)
            except ValueError as error:
                bad.append(Bad(index, str(error)))
                room.clear(index)
        return bad

    def _put(self, plan: Plan, room: Room, index: int) -> None:
        """Raises ValueError when member `index` of the plan cannot be used."""
        place = (int(plan.shard[index]), int(plan.offset[index]))
        pixels = self._decoded.get(place)
        if pixels is not None:
            cut_decoded(pixels, plan.draws[index], self.data, self.augment, room.image(index))
            return
        file = self._reader.read(*place, int(plan.size[index]), int(plan.crc32[index]))
        if plan.dim is not None and plan.dim[index]:
            room.put_numbers(index, decode_vector(file, int(plan.dim[index])))
            return
        sound = self._manifest.shard_file(place[0]).decoded
        keep = partial(self._decoded.keep, place) if self._decoded.open else None
        cut(file, plan.draws[index], self.data, self.augment, sound=sound, keep=keep, out=room.image(index))


def single_core_threads(count: int, name: str = "decode") -> Threads:
    """Threads in which torch's kernels use one core each; the setting of all other threads stays what it was.

    Resizing would otherwise start a team of all cores in each of them (measured on two busy cores: up to 50 times slower).
    """
    pool = Threads(count, name)
    before = torch.get_num_threads()
    ready = threading.Barrier(count)  # so that every task gets a thread of its own

    def limit() -> None:
        torch.get_num_threads()  # a thread's first call takes over the common setting: now, not after the next line
        # Holds for this thread, and for threads that have not used torch yet: that part is taken back below.
        torch.set_num_threads(1)
        ready.wait()

    for task in [pool.submit(limit) for _ in range(count)]:
        task.result()
    torch.set_num_threads(before)
    return pool
