"""Run a function over items in processes, keeping their order."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Map(Protocol):
    """What pipelines hand their work to: results in the order of the items; an exception surfaces where its result would."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


def in_process(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
    """In this process."""
    return map(function, items)


def process_map(workers: int) -> Map:
    """A bounded number of items under way in `workers` fresh processes (spawned: forking is not safe beside threads)."""

    def run(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        pending: deque[Future[R]] = deque()
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    return run


def when_slow(workers: int, *, after_s: float = 2.0) -> Map:
    """Begin in this process and go over to `workers` processes when it takes longer: they take seconds to start."""

    def run(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        left, until = iter(items), time.monotonic() + after_s
        for item in left:
            yield function(item)
            if workers > 1 and time.monotonic() > until:
                break
        yield from process_map(workers)(function, left)

    return run
