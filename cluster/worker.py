"""What every rank runs: build the parts from the config, resume, fit."""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster import attempts
from cluster.context import RankContext
from cluster.memory import memory_advice, out_of_memory
from cluster.resume import refuse_other
from cluster.runfolder import MetricsFile, RunFolder, append_line, write_atomically
from cluster.saving import Saving
from configs.errors import Unrecoverable
from configs.schema import RunConfig
from pipelines import augment, growth
from pipelines.batch import Batch
from pipelines.manifest import Manifest
from pipelines.mixture import open_sources
from pipelines.stream import Loader, evaluation_batches
from trainer import checkpoints, collectives, reproducible, state
from trainer.checkpoints import Saved
from trainer.control import Control
from trainer.encoders import build_encoder
from trainer.evaluate import evaluate
from trainer.loop import Hooks, fit
from trainer.objective import build_objective
from trainer.optim import Average, build_optimizer
from trainer.sharding import sharded_parameters
from trainer.stores import Store
from trainer.warm import start_from

EVALUATION_BATCH = 256  # images a rank embeds at once; changes no result
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """What the driver hands to every rank: picklable, all paths absolute."""

    config: RunConfig
    run: Path
    steps: int
    histories: tuple[growth.History, ...]  # of the data: every worker and every restart reads what the driver saw
    launch_id: str  # one per start of the driver; restarts of the workers share it


def worker_main(context: RankContext, job: Job) -> None:
    """Train on this rank until the job's last step, from the newest checkpoint. Every rank runs it.

    Raises Unrecoverable when trying again is useless, also when an earlier start of the same launch found that.
    """
    refuse_useless(job)
    try:
        with reproducible.kernels() if job.config.train.reproducible else contextlib.nullcontext():
            _train(context, job)
    except (ValueError, Unrecoverable) as error:
        raise _stop(job, str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise _stop(job, memory_advice(job.config, error)) from error
        attempts.ended(job.run, f"rank {context.rank}: {type(error).__name__}: {error}")
        raise
    except Exception as error:
        attempts.ended(job.run, f"rank {context.rank}: {type(error).__name__}: {error}")
        raise


def _stop(job: Job, reason: str) -> Unrecoverable:
    """The error, with its reason left for the driver and for ranks that are started again."""
    attempts.ended(job.run, reason, sure=True)
    for file in _stop_files(job):
        with suppress(OSError):
            write_atomically(file, reason)
            break
    return Unrecoverable(reason)


def refuse_useless(job: Job) -> None:
    """Raise Unrecoverable when a rank of this launch has left a reason."""
    for file in _stop_files(job):
        if file.exists():
            raise Unrecoverable(file.read_text(encoding="utf-8"))


def forget(job: Job) -> None:
    """Remove what a launch leaves for its own restarts only."""
    for file in _stop_files(job):
        file.unlink(missing_ok=True)


def _stop_files(job: Job) -> list[Path]:
    """Where the reason may be: with the run, or, when that disk is full, with this machine's temporary files."""
    return [job.run / f".stop-{job.launch_id}", Path(tempfile.gettempdir()) / f"nearfar-stop-{job.launch_id}"]


def _train(context: RankContext, job: Job) -> None:
    config, folder = job.config, RunFolder(job.run)
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    manifest = open_sources(config.data.train, config.data.cache)
    growth.verify(job.histories, manifest)
    training = build_training(config, manifest, context.device, dtype, init=folder.init if config.encoder.init else None)
    if config.train.compile:
        training.encoder.compile()  # in place: the names of the weights stay
    store = folder.checkpoints(config)
    saved = collectives.from_first(lambda: _begin(context, job, store))
    if saved is not None:
        refuse_other(saved, config)
        state.restore(saved, training)
    else:
        own = sharded_parameters(training.objective)  # drawn alike on any number of ranks, each its rows
        shared = [p for p in training.objective.parameters() if p not in own]
        collectives.broadcast([*training.encoder.state_dict().values(), *shared])
    start, position = (saved.step, saved.position) if saved is not None else (0, 0)
    metrics = collectives.from_first(lambda: MetricsFile(folder.metrics))
    sources = [history.as_dict() for history in job.histories]
    saving = Saving(config, training, store, metrics, sources, hashes=folder.hashes)
    hooks = Hooks(
        prepare=augmented(config, dtype),
        evaluate=evaluator(config, context, dtype),
        log=saving.log,
        save=saving.save,
    )
    loader = Loader(
        manifest,
        config.data,
        seed=config.seed,
        rank=context.rank,
        world=context.world,
        position=position,
        histories=job.histories,
        on_bad=functools.partial(append_line, folder.quarantine),
        piece=config.train.piece,
    )
    with saving, loader as stream:
        fit(config, training, stream, hooks, start=start, steps=job.steps)


def _begin(context: RankContext, job: Job, store: Store) -> Saved | None:
    """The checkpoint to go on from, once what the last attempt left is put away and this one has its row."""
    folder = RunFolder(job.run)
    store.collect()
    found = checkpoints.search(store)
    if attempts.begun(folder, job.launch_id):  # at the first start the driver has told
        for reason in found.skipped:
            logger.warning("checkpoint passed over: %s", reason)
    attempts.begin(
        folder,
        launch=job.launch_id,
        world=context.world,
        from_step=0 if found.saved is None else found.saved.step,
        skipped=found.skipped,
        more={"device": str(context.device)},
    )
    return found.saved


def build_training(
    config: RunConfig, manifest: Manifest, device: torch.device, dtype: torch.dtype, *, init: Path | None = None
) -> state.Training:
    """Encoder, averaged encoder, objective and optimizer on `device`; `init`: file of weights to begin with."""
    encoder = build_encoder(config.encoder, config.data.image_size)
    if init is not None:
        start_from(encoder, load_file(init), skip=config.encoder.init_skip)
    encoder = encoder.to(device=device, dtype=dtype)
    if config.train.channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = objective_for(config, manifest, encoder).to(device=device, dtype=dtype)
    average = Average(encoder, config.train.ema)
    keys = Average(encoder, config.train.momentum) if config.train.momentum else None
    optimizer = build_optimizer(config.optim, [encoder, objective])
    return state.Training(encoder, average, objective, optimizer, keys, Control(config.train))


def objective_for(config: RunConfig, manifest: Manifest, encoder: nn.Module) -> nn.Module:
    """The config's objective, told of the encoder's dimension and of the data's classes."""
    classes = manifest.classes if manifest.kind == "labelled" else None
    groups = None if classes is None else torch.from_numpy(classes.groups)
    counts = None if classes is None else torch.from_numpy(classes.counts)
    # Every rank computes a reproducible loss whole, so it holds all class centres.
    with collectives.alone() if config.train.reproducible else contextlib.nullcontext():
        return build_objective(config.loss, dim=int(encoder.dim), groups=groups, counts=counts)  # type: ignore[arg-type]


def augmented(config: RunConfig, dtype: torch.dtype) -> Callable[[Batch], Tensor]:
    """Batch to augmented float images on the batch's device."""

    def prepare(batch: Batch) -> Tensor:
        images = augment.apply(batch.images, batch.draws, config.data.augment, dtype)
        return images.contiguous(memory_format=torch.channels_last) if config.train.channels_last else images

    return prepare


def plain(device: torch.device, dtype: torch.dtype) -> Callable[[Batch], Tensor]:
    """Batch to float images on `device`, as they are."""
    return lambda batch: batch.images.to(device, non_blocking=True).contiguous().to(dtype) / 255


def evaluator(config: RunConfig, context: RankContext, dtype: torch.dtype) -> Callable[[nn.Module], dict[str, float]] | None:
    """Metrics on `data.eval`, or nothing when there is no such set."""
    if config.data.eval is None:
        return None
    manifest = Manifest.open(config.data.eval, cache=config.data.cache)
    fixed = config.train.reproducible
    size = config.train.piece if fixed else EVALUATION_BATCH

    def run(encoder: nn.Module) -> dict[str, float]:
        batches = evaluation_batches(manifest, config.data, rank=context.rank, world=context.world, batch=size, fixed=fixed)
        found = evaluate(encoder, batches, plain(context.device, dtype), reproducible=fixed)
        return {f"val/{name}": value for name, value in found.items()}

    return run
