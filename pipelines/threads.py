"""Threads that run tasks in order, and that never keep `shutdown` or the interpreter from ending."""

from __future__ import annotations

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
JOIN_S = 5.0  # how long a shutdown waits for what is being done; a hanging read is left behind

_Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Threads:
    """`count` daemon threads. concurrent.futures joins its threads at exit, for ever when one of them hangs in a read."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks,), name=f"nearfar-{name}-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()
        # At the latest at exit: a daemon thread that is then still inside torch would crash the interpreter.
        self._stop = weakref.finalize(self, _stop, self._tasks, self._threads)

    def submit(self, function: Callable[..., T], *args: Any, after: Sequence[Future[Any]] = ()) -> Future[T]:
        """Run `function(*args)` as soon as a thread is free and all of `after` are done, whatever became of them."""
        future: Future[T] = Future()
        tasks, task = self._tasks, (future, function, args)
        if not after:
            tasks.put(task)
        left = itertools.count(len(after) - 1, -1)  # the callbacks come from many threads; `next` is atomic

        def one_done(_: Future[Any]) -> None:
            if next(left) == 0:
                tasks.put(task)

        for other in after:
            other.add_done_callback(one_done)
        return future

    def shutdown(self) -> None:
        """Cancel what has not begun and wait for the rest, JOIN_S at most."""
        self._stop()


def _work(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        future, function, args = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)
        del task, future, function, args  # an idle thread keeps nothing alive


def _stop(tasks: queue.SimpleQueue[_Task | None], threads: Sequence[threading.Thread]) -> None:
    while not tasks.empty():
        try:
            task = tasks.get_nowait()
        except queue.Empty:
            break
        if task is not None:
            task[0].cancel()
    for _ in threads:
        tasks.put(None)
    deadline = time.monotonic() + JOIN_S
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
