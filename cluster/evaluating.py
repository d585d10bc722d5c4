"""`nearfar evaluate`: a model of any kind on any shards, by this process or by several."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cluster import context
from cluster.context import RankContext
from cluster.evaluation import EvaluationSet, Loading
from cluster.models import Model, open_model
from cluster.processes import run_ranks
from cluster.progress import bar
from cluster.runfolder import write_atomically
from configs.evaluation import Evaluate, expand
from trainer import collectives
from trainer.encoders.towers import Towers
from trainer.measurement import Evaluation

BATCH = 64  # images a process embeds at once, always as many, so that any number of processes gives the same vectors
TIMEOUT_S = 3600.0  # for one process to wait for the others


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be measured: `model` on `shards`."""

    model: str
    shards: str
    how: Evaluate
    ks: tuple[int, ...]
    resamples: int
    device: str  # cpu, cuda or auto
    uri: str | None = None

    @property
    def gpu(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())


def run_evaluation(request: Request, *, workers: int = 1) -> dict[str, Any]:
    """Everything that was measured, as plain values. Raises ValueError for what cannot be measured."""
    _check_device(request, workers)
    sets = EvaluationSet.open(request.shards, request.how)
    sets.check(request.how.metrics)
    if workers == 1:
        here = context.single(gpu=request.gpu)
        model = open_model(request.model, uri=request.uri, device=here.device)
        return _measured(request, sets, model, here)
    open_model(request.model, uri=request.uri)  # what is wrong with it is told here
    with TemporaryDirectory(prefix="nearfar-") as folder:
        out = Path(folder) / "result.json"
        run_ranks(workers, partial(_rank, world=workers, request=request, out=out), timeout_s=TIMEOUT_S)
        found: dict[str, Any] = json.loads(out.read_text("utf-8"))
        return found


def describe(result: dict[str, Any]) -> str:
    """A result for a person."""
    where = "among themselves" if result["gallery"] is None else f"in {result['gallery_images']} of {result['gallery']}"
    if result["sides"] != "all":
        among = f"{result['gallery_images']} " + ("positives" if result["sides"] == "anchors" else "anchors")
        where = f"in {among} of {result['gallery'] or 'the same'}"
    what = "images  " if result["sides"] == "all" else result["sides"][:9]
    lines = [f"model    {result['model']}", f"{what} {result['images']} of {result['shards']}, searched {where}"]
    if result["distance"] == "euclidean":
        lines.append("distance euclidean, of raw vectors; thresholds are distances")
    if result["queries"] < result["images"]:
        lines.append(f"queries  {result['queries']}: the others have nothing to find")
    pairs = result["pairs"]
    if pairs and (pairs["same_used"], pairs["different_used"]) != (pairs["same"], pairs["different"]):
        drawn = f"{pairs['same_used']} of {pairs['same']} alike, {pairs['different_used']} of {pairs['different']} others"
        lines.append(f"pairs    a random sample: {drawn}")
    lines += [f"{name:24}{value:.4f}{_interval(result, name)}" for name, value in result["metrics"].items()]
    first = next(iter(result["intervals"] or result["metrics"]), "")
    for part, values in result["parts"].items():
        found = f"  {first} {values[first]:.3f}" if first in values else ""
        lines.append(f"{part:24}{values['queries']} queries{found}")
    if "mlflow_run_id" in result:
        lines.append(f"MLflow   run {result['mlflow_run_id']}")
    return "\n".join(lines)


def _interval(result: dict[str, Any], name: str) -> str:
    if name not in result["intervals"]:
        return ""
    low, high = result["intervals"][name]
    return f"  [{low:.3f}, {high:.3f}]"


def _rank(rank: int, folder: Path, *, world: int, request: Request, out: Path) -> None:
    context.share_cores(world)
    here = context.spawned(rank, world, folder / "store", gpu=request.gpu, timeout_s=TIMEOUT_S)
    model = open_model(request.model, uri=request.uri, device=here.device)
    result = _measured(request, EvaluationSet.open(request.shards, request.how), model, here)
    if rank == 0:
        write_atomically(out, json.dumps(result))
    collectives.leave()
    context.finish()


def _measured(request: Request, sets: EvaluationSet, model: Model, here: RankContext) -> dict[str, Any]:
    names = expand(request.how.metrics, request.ks)
    data = model.data(request.shards)
    for manifest in (sets.queries, *(() if sets.gallery is None else (sets.gallery,))):
        if not isinstance(model.module, Towers) and manifest.vector_dim not in (0, model.dim):
            raise ValueError(f"{manifest.location} has vectors of {manifest.vector_dim} numbers, the model of {model.dim}")
    with bar("evaluating", "batches") as report:
        loading = Loading(data, here, BATCH, fixed=True, beat=_counting(report) if here.rank == 0 else lambda: None)
        found = sets.measure(
            model.module if isinstance(model.module, Towers) else model.module.__call__,
            lambda batch: batch.images.to(here.device).contiguous(),
            names,
            loading,
            resamples=request.resamples,
        )
    return _as_dict(request, sets.parts, model, found)


def _counting(report: Callable[..., None]) -> Callable[[], None]:
    done = 0

    def beat() -> None:
        nonlocal done
        done += 1
        report(done)

    return beat


def _as_dict(request: Request, parts: Sequence[str], model: Model, found: Evaluation) -> dict[str, Any]:
    return {
        "model": model.origin,
        "shards": request.shards,
        "distance": "euclidean" if model.raw else "cosine",
        "gallery": request.how.gallery,
        "sides": request.how.queries,
        "images": found.images,
        "gallery_images": found.gallery,
        "queries": found.queries,
        "metrics": found.values,
        "intervals": found.intervals,
        "parts": {parts[number]: values for number, values in found.parts.items()},
        "pairs": found.pairs,
    }


def _check_device(request: Request, workers: int) -> None:
    if request.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {request.device}: there are auto, cpu and cuda")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    if request.gpu and workers > torch.cuda.device_count():
        raise ValueError(f"--workers {workers}: there are {torch.cuda.device_count()} GPUs here; lower it, or use --device cpu")
