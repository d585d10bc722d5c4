"""What every rank runs: build the parts from the config, resume, fit."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from cluster import attempts
from cluster.building import augmented, build_training, evaluator
from cluster.context import RankContext
from cluster.job import Job, refuse_useless, stop
from cluster.memory import memory_advice, out_of_memory
from cluster.nodes import describe, nodes_of_ranks, oddities
from cluster.profiling import Profile
from cluster.resume import refuse_other
from cluster.runfolder import MetricsFile, RunFolder, append_line, write_atomically
from cluster.saving import Saving
from cluster.versions import refuse_skew
from cluster.watchdog import Watchdog
from configs.errors import Unrecoverable
from pipelines import growth
from pipelines.apart import LoaderApart
from pipelines.manifest import Manifest
from pipelines.mixture import open_sources
from pipelines.stream import Loader
from trainer import checkpoints, collectives, reproducible, state
from trainer.agreement import Wish
from trainer.checkpoints import Saved
from trainer.loop import Hooks, fit
from trainer.sharding import sharded_parameters
from trainer.stores import Store

COMPILE_S = 1800.0  # that the first step may take longer than the others
logger = logging.getLogger(__name__)


def worker_main(context: RankContext, job: Job) -> None:
    """Train on this rank until the job's last step, from the newest checkpoint. Every rank runs it.

    Raises Unrecoverable when trying again is useless, also when an earlier start of the same launch found that.
    """
    refuse_useless(job)
    try:
        refuse_skew(job.versions)
        with reproducible.kernels() if job.config.train.reproducible else contextlib.nullcontext():
            _train(context, job)
    except (ValueError, Unrecoverable) as error:
        raise stop(job, str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise stop(job, memory_advice(job.config, error)) from error
        attempts.ended(job.run, f"rank {context.rank}: {type(error).__name__}: {error}")
        raise
    except Exception as error:
        attempts.ended(job.run, f"rank {context.rank}: {type(error).__name__}: {error}")
        raise


def _train(context: RankContext, job: Job) -> None:
    config, folder = job.config, RunFolder(job.run)
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    manifest = open_sources(config.data.train, config.data.cache)
    growth.verify(job.histories, manifest)
    training = build_training(config, manifest, context.device, dtype, init=folder.init if config.encoder.warm else None)
    if config.train.compile:
        training.encoder.compile()  # in place: the names of the weights stay
    store = folder.checkpoints(config)
    nodes = nodes_of_ranks(context.node, context.device)
    about = {"device": str(context.device), "nodes": describe(nodes), "oddities": oddities(nodes)}
    saved = collectives.from_first(lambda: _begin(context, job, store, about))
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
    watchdog = Watchdog(
        folder.stacks / f"rank-{context.rank}.txt",
        config.cluster.timeout_s,
        lambda reason: attempts.ended(job.run, f"rank {context.rank} {reason}", sure=True),
        first_s=COMPILE_S if config.train.compile else 0.0,
    )
    profile = Profile(
        folder.profile,
        job.profile,
        start=start,
        parameters=list(training.encoder.parameters()) if job.profile else [],
        device=context.device,
        nodes=[node.name for node in nodes],
    )

    def beat(step: int) -> None:
        watchdog.beat(step)
        profile.beat(step)

    hooks = Hooks(
        prepare=augmented(config, dtype),
        evaluate=evaluator(config, context, dtype, watchdog.beat),
        log=saving.log,
        save=saving.save,
        wish=_wish(context, job),
        beat=beat,
    )
    with saving, _loader(context, job, manifest, position) as stream, watchdog, profile:
        last = fit(config, training, stream, hooks, start=start, steps=job.steps)
    if last < job.steps and not training.control.ended and context.rank == 0:
        asked = job.request.read_text(encoding="utf-8") if job.request.exists() else "stopped by SIGTERM to a worker"
        attempts.ended(job.run, asked, sure=True)
        write_atomically(job.stopped, f"{asked}; the state of step {last} is saved")


def _loader(context: RankContext, job: Job, manifest: Manifest, position: int) -> Loader | LoaderApart:
    """The stream from `position` on; beside a GPU in processes of its own."""
    options: dict[str, Any] = {
        "seed": job.config.seed,
        "rank": context.rank,
        "world": context.world,
        "position": position,
        "histories": job.histories,
        "on_bad": functools.partial(append_line, RunFolder(job.run).quarantine),
        "piece": job.config.train.piece,
    }
    if context.device.type == "cpu":
        return Loader(manifest, job.config.data, **options)
    return LoaderApart(job.config.data, pinned=True, **options)


def _wish(context: RankContext, job: Job) -> Callable[[], Wish]:
    """Of this rank: to stop when it or the driver is told to, to save once when a node is about to go."""
    preempted = False

    def wish() -> Wish:
        nonlocal preempted
        before, preempted = preempted, context.preempted() or preempted
        if context.terminated() or (context.rank == 0 and job.request.exists()):
            return Wish.STOP
        if preempted and not before:
            logger.warning("a node of this run is about to go: saving a checkpoint")
            attempts.ended(job.run, "a node was preempted; a checkpoint was saved before")
            return Wish.SAVE
        return Wish.NONE

    return wish


def _begin(context: RankContext, job: Job, store: Store, about: dict[str, Any]) -> Saved | None:
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
        more=about,
    )
    return found.saved
