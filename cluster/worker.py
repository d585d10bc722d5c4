"""What every rank runs: build the parts from the config, resume, fit."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.context import RankContext
from cluster.runfolder import MetricsFile, RunFolder, append_line, write_atomically
from configs.schema import RunConfig
from pipelines import augment
from pipelines.batch import Batch
from pipelines.manifest import Manifest
from pipelines.stream import Loader, evaluation_batches
from trainer import collectives, state
from trainer.encoders import build_encoder
from trainer.evaluate import evaluate
from trainer.loop import Hooks, fit
from trainer.objective import build_objective
from trainer.optim import Average, build_optimizer

EVALUATION_BATCH = 256  # images a rank embeds at once; changes no result
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """What the driver hands to every rank: picklable, all paths absolute."""

    config: RunConfig
    run: Path
    steps: int
    launch_id: str  # one per start of the driver; restarts of the workers share it


class Stopped(RuntimeError):
    """The run ended for a reason that a restart would only meet again."""


def worker_main(context: RankContext, job: Job) -> None:
    """Train on this rank until the job's last step, from the newest checkpoint. Every rank runs it.

    Raises Stopped when an earlier start of the same launch found that trying again is useless.
    """
    stop = job.run / f".stop-{job.launch_id}.json"
    if stop.exists():
        raise Stopped(json.loads(stop.read_text())["message"])
    try:
        _train(context, job)
    except (ValueError, RuntimeError) as error:
        if context.world > 1 and not _from_elsewhere(error):
            write_atomically(stop, json.dumps({"message": str(error)}))
        raise


def _train(context: RankContext, job: Job) -> None:
    config, folder = job.config, RunFolder(job.run)
    first = context.rank == 0
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    training = build_training(config, context.device, dtype)
    manifest = Manifest.open(config.data.train)
    identity = {**config.identity(), "digest": manifest.digest}
    saved = collectives.from_first(lambda: state.newest(folder.checkpoints))
    if saved is not None:
        state.restore(saved, training)
    else:
        collectives.broadcast([*training.encoder.state_dict().values(), *training.objective.parameters()])
    start, position = (saved.step, saved.position) if saved is not None else (0, 0)
    if first:
        row = {"time": time.time(), "world": context.world, "from_step": start, "device": str(context.device)}
        append_line(folder.attempts, row)
    metrics = MetricsFile(folder.metrics) if first else None

    def save(step: int, position: int) -> None:
        if first:
            state.save(folder.checkpoints, training, step=step, position=position, identity=identity, keep=config.train.keep)

    hooks = Hooks(
        prepare=preparer(config, context.device, dtype),
        evaluate=evaluator(config, context, dtype),
        log=lambda step, values: metrics.append(step, values) if metrics is not None else None,
        save=save,
        beat=lambda step: None,
    )
    with Loader(
        manifest,
        config.data,
        seed=config.seed,
        rank=context.rank,
        world=context.world,
        position=position,
        on_bad=functools.partial(append_line, folder.quarantine),
    ) as stream:
        fit(config, training, stream, hooks, start=start, steps=job.steps)


def build_training(config: RunConfig, device: torch.device, dtype: torch.dtype) -> state.Training:
    """Encoder, averaged encoder, objective and optimizer on `device`."""
    encoder = build_encoder(config.encoder, config.data.image_size).to(device=device, dtype=dtype)
    objective = build_objective(config.loss).to(device=device, dtype=dtype)
    average = Average(encoder, config.train.ema)
    return state.Training(encoder, average, objective, build_optimizer(config.optim, [encoder, objective]))


def preparer(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Callable[[Batch], Tensor]:
    """Batch to augmented float images on `device`."""

    def prepare(batch: Batch) -> Tensor:
        images = batch.images.to(device, non_blocking=True)
        return augment.apply(images, batch.draws.to(device, non_blocking=True), config.data.augment, dtype)

    return prepare


def plain(device: torch.device, dtype: torch.dtype) -> Callable[[Batch], Tensor]:
    """Batch to float images on `device`, as they are."""
    return lambda batch: batch.images.to(device, non_blocking=True).to(dtype) / 255


def evaluator(config: RunConfig, context: RankContext, dtype: torch.dtype) -> Callable[[nn.Module], dict[str, float]] | None:
    """Metrics on `data.eval`, or nothing when there is no such set."""
    if config.data.eval is None:
        return None
    manifest = Manifest.open(config.data.eval)

    def run(encoder: nn.Module) -> dict[str, float]:
        batches = evaluation_batches(manifest, config.data, rank=context.rank, world=context.world, batch=EVALUATION_BATCH)
        found = evaluate(encoder, batches, plain(context.device, dtype))
        return {f"val/{name}": value for name, value in found.items()}

    return run


def _from_elsewhere(error: Exception) -> bool:
    """Whether the error may be another rank's or the machine's, so that starting again can help."""
    text = f"{type(error).__name__} {error}".lower()
    signs = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "cuda error", "distbackenderror", "broken pipe")
    return any(sign in text for sign in signs)
