"""Run a function over many items in threads or processes, keeping their order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import Connection
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Map(Protocol):
    """Applies a function that can be pickled to every item, somewhere; results in the order of the items.

    Items are taken as they are needed. An exception surfaces where its result would. Closing the iterator ends what runs, or
    leaves that to the end of the map's owner.
    """

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Generator[R, None, None]: ...


def in_process(function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """One after the other, right here."""
    return (function(item) for item in items)


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """In threads; one worker is none."""
    if workers == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="nearfar-pack")
    try:
        yield from _in_order(pool, function, items, ahead=4 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def process_map(workers: int) -> Map:
    """In processes of their own, which end with this one. Raises RuntimeError when one of them is killed."""
    return partial(_map_in_processes, workers)


def when_slow(workers: int, *, after_s: float = 2.0) -> Map:
    """Begin in this process and go over to `workers` processes when it takes longer: they take seconds to start."""

    def run(function: Callable[[T], R], items: Iterable[T], /) -> Generator[R, None, None]:
        left, until = iter(items), time.monotonic() + after_s
        for item in left:
            yield function(item)
            if workers > 1 and time.monotonic() > until:
                break
        yield from process_map(workers)(function, left)

    return run


def _map_in_processes(workers: int, function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    # Spawned: a fork would copy whatever threads of torch and Arrow hold at that moment.
    context = multiprocessing.get_context("spawn")
    ending, alive = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_live_with, initargs=(ending,))
    try:
        yield from _in_order(pool, function, items, ahead=2 * workers)
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process was killed, perhaps for want of memory: try again with fewer --workers") from error
    except BaseException:
        alive.close()  # not to wait for what they are in the middle of
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        alive.close()
        ending.close()


def _in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], *, ahead: int) -> Iterator[R]:
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _live_with(parent: Connection) -> None:
    """End this process when the other end of the pipe is closed, be it by a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair

    def watch() -> None:
        parent.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
