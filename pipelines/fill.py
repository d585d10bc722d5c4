"""Carries a plan out: reads and decodes its images, in threads and ahead of time, in the order of the plans."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.schema import Augment, Data
from pipelines.batch import Batch
from pipelines.crop import cut
from pipelines.manifest import Manifest
from pipelines.plan import Plan
from pipelines.read import Reader

IMAGES_PER_TASK = 16


@dataclass(frozen=True, slots=True)
class Bad:
    """An image that could not be used: its index in the batch, and why."""

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
    images: Tensor
    parts: list[Future[list[Bad]]]


class Filler:
    """An iterator of filled plans, `prefetch` of them ahead of the consumer.

    `plans` makes the next plan each time it is called, from one thread at a time and in order; StopIteration ends it.
    What goes wrong in a thread is raised by `next`. `wait_s` is how long the consumer has waited so far.
    """

    def __init__(self, manifest: Manifest, data: Data, augment: Augment, plans: Iterator[Callable[[], Plan]]) -> None:
        self.data, self.augment = data, augment
        self.wait_s = 0.0
        self._plans = plans
        self._reader = Reader(manifest)
        self._pool = single_core_threads(data.threads)
        self._ahead: deque[Future[_Started]] = deque()
        self._closed = False

    def __iter__(self) -> Filler:
        return self

    def __next__(self) -> Filled:
        if self._closed:
            raise RuntimeError("the loader is closed")
        while len(self._ahead) < self.data.prefetch and (plan := next(self._plans, None)) is not None:
            self._ahead.append(self._pool.submit(self._start, plan))
        if not self._ahead:
            raise StopIteration
        started = time.perf_counter()
        try:
            work = self._ahead.popleft().result()
            bad = [bad for part in work.parts for bad in part.result()]
        except BaseException:
            self.close()
            raise
        self.wait_s += time.perf_counter() - started
        return Filled(work.plan, _assemble(work.plan, work.images, bad), bad)

    def close(self) -> None:
        """Stop the threads and close the files; what was read ahead is forgotten."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()
        self._reader.close()

    def _start(self, make: Callable[[], Plan]) -> _Started:
        plan = make()
        side = self.data.image_size
        # `_fill` writes all of it. Channels last, as they are decoded: the device turns a whole batch at once for less.
        images = torch.empty((plan.num_images, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        starts = range(0, plan.num_images, IMAGES_PER_TASK)
        parts = [self._pool.submit(self._fill, plan, images, start, start + IMAGES_PER_TASK) for start in starts]
        return _Started(plan, images, parts)

    def _fill(self, plan: Plan, images: Tensor, start: int, stop: int) -> list[Bad]:
        bad = []
        for index in range(start, min(stop, plan.num_images)):
            if not plan.present[index]:
                images[index] = 0
                continue
            where = (int(plan.shard[index]), int(plan.offset[index]), int(plan.size[index]), int(plan.crc32[index]))
            try:
                images[index] = cut(self._reader.read(*where), plan.draws[index], self.data, self.augment)
            except ValueError as error:
                bad.append(Bad(index, str(error)))
                images[index] = 0
        return bad


def single_core_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch's kernels use one core each; the setting of all other threads stays what it was.

    Resizing would otherwise start a team of all cores in each of them (measured on two busy cores: up to 50 times slower).
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix="nearfar-decode")
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


def _assemble(plan: Plan, images: Tensor, bad: list[Bad]) -> Batch:
    valid = plan.present.copy()
    valid[[one.index for one in bad]] = False
    spoiled = np.zeros(len(plan.sample), dtype=bool)  # one bad image spoils its record
    spoiled[plan.record[~valid]] = True
    valid &= ~spoiled[plan.record]
    return Batch(
        images=images,
        group=torch.from_numpy(plan.group),
        uid=torch.from_numpy(plan.uid),
        view=torch.from_numpy(plan.view),
        record=torch.from_numpy(plan.record),
        valid=torch.from_numpy(valid),
        draws=torch.from_numpy(plan.draws),
        sample=torch.from_numpy(plan.sample),
        match=None if plan.match is None else torch.from_numpy(plan.match),
        weight=None if plan.weight is None else torch.from_numpy(plan.weight),
    )
