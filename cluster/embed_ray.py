"""Embedding on Ray Data: spans go out, parts come back; pixels never cross the object store."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from itertools import islice
from typing import Any

from cluster.embed_worker import Embedder, Job, Part
from cluster.launch import init_ray, quiet_ray
from pipelines.image_set import Span

SPANS_AT_ONCE = 4096  # given to Ray together: what is known of a folder's images travels with its spans


@contextmanager
def ray_embedder(
    job: Job, address: str | None, workers: int | None, gpus: float, most: int
) -> Iterator[Callable[[Iterable[Span]], Generator[Part, None, None]]]:
    """A map of spans to parts, in any order, over the cluster at `address` or this machine's own.

    `workers`: default one for each CPU, or for each share `gpus` of a GPU; never more than `most`.
    Raises RuntimeError when the cluster cannot be reached or is too small.
    """
    quiet_ray()
    import ray

    started = not ray.is_initialized()
    with redirect_stdout(sys.stderr):
        if started:
            init_ray(address, workers or 1, otherwise="--local embeds without Ray")
        try:
            _quiet_data()
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            count = min(workers or max(1, room(nodes, 1, gpus)), most)
            each = cpus_each(nodes, count, gpus)
            one = replace(job, threads=each, torch_threads=each, gpu=gpus > 0)
            yield lambda spans: _embed(one, spans, count, each, gpus)
        finally:
            if started:
                ray.shutdown()


def room(nodes: Sequence[Mapping[str, float]], cpus: int, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs fit on the nodes, given as Ray tells their resources."""
    return sum(min(int(node.get("CPU", 0) / cpus), int(node.get("GPU", 0) / gpus) if gpus else sys.maxsize) for node in nodes)


def cpus_each(nodes: Sequence[Mapping[str, float]], count: int, gpus: float) -> int:
    """The most CPUs that each of `count` workers can have: asking for more than fits would wait for ever.

    Raises RuntimeError when even one each is too many.
    """
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    for cpus in range(largest, 0, -1):
        if room(nodes, cpus, gpus) >= count:
            return cpus
    needs = f"{count} workers of 1 CPU" + (f" and {gpus:g} GPUs" if gpus else "")
    have = " and ".join(f"{sum(node.get(kind, 0) for node in nodes):g} {kind}s" for kind in ("CPU", "GPU"))
    raise RuntimeError(f"{needs} do not fit on the cluster, which has {have}; lower --workers or --gpus-per-worker")


class Actor:
    """An Embedder that Ray Data can call. What goes wrong comes back like a part: Ray would tell of it at length."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._embedder: Embedder | None = None

    def __call__(self, batch: Any) -> dict[str, list[bytes]]:
        return {"part": [pickle.dumps(self._try(pickle.loads(span))) for span in batch["span"].to_pylist()]}

    def _try(self, span: Span) -> Part | Exception:
        try:
            self._embedder = self._embedder or Embedder(self._job)
            return self._embedder(span)
        except (ValueError, RuntimeError, OSError) as error:
            return error


def _embed(job: Job, spans: Iterable[Span], workers: int, cpus: int, gpus: float) -> Generator[Part, None, None]:
    import ray
    from ray.exceptions import RayError

    left = iter(spans)
    while some := [{"span": pickle.dumps(span)} for span in islice(left, SPANS_AT_ONCE)]:
        pool = ray.data.ActorPoolStrategy(size=min(workers, len(some)))
        options = {"compute": pool, "num_cpus": cpus, "num_gpus": gpus, "fn_constructor_args": (job,)}
        data = ray.data.from_items(some, override_num_blocks=len(some))
        parts = data.map_batches(Actor, batch_size=1, batch_format="pyarrow", **options)
        try:
            for row in parts.iter_rows():
                found = pickle.loads(row["part"])
                if isinstance(found, Exception):
                    raise found
                yield found
        except RayError as error:
            raise RuntimeError(f"a worker was lost: {str(error).strip().splitlines()[0]}") from error


def _quiet_data() -> None:
    import ray

    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
