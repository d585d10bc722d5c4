"""Functions over many items as Ray tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from cluster.launch import init_ray, quiet_ray
from pipelines.parallel import Map

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def ray_map(address: str | None, workers: int | None = None) -> Iterator[tuple[Map, int]]:
    """A map over the cluster at `address`, or over this machine's own, and how many tasks it runs at a time.

    `workers` sets that number. Raises RuntimeError when the cluster cannot be reached.
    """
    quiet_ray()
    import ray

    started = not ray.is_initialized()
    if started:
        init_ray(address, workers or 1, otherwise="without --ray and --address processes of this machine do it")
    try:
        tasks = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        yield partial(_map, tasks), tasks
    finally:
        if started:
            ray.shutdown()


def _map(tasks: int, function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    # Nothing is cancelled at an exception: `ray.cancel` of a task that is just ending aborts the driver (Ray 2.60). What
    # was begun ends with the driver's connection, or by itself.
    import ray

    task = ray.remote(num_cpus=1)(function)
    pending: deque[Any] = deque()
    for item in items:
        pending.append(task.remote(item))
        if len(pending) >= 2 * tasks:
            yield _result(pending.popleft())
    while pending:
        yield _result(pending.popleft())


def _result(reference: Any) -> Any:
    """Raises what the task raised; RuntimeError when it was lost more often than Ray tries again."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause or RuntimeError(str(error)) from None
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"a Ray task was lost: {str(error).strip().splitlines()[0]}") from error
