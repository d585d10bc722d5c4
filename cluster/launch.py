"""Starts the ranks: in this process, as local processes, or as Ray Train workers."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from cluster import attempts, capacity, interfaces
from cluster.job import Job, forget, refuse_useless
from cluster.preflight import preflight
from cluster.processes import RankFailed, run_ranks
from cluster.stopping import Stopping
from cluster.worker import worker_main

RESIZE_EVERY_S = 30.0  # how often an elastic run looks whether there is room for more workers
logger = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """The ranks saved their state and stopped, as they were asked to."""


def run(job: Job, stopping: Stopping | None = None, *, local: bool, address: str | None = None) -> None:
    """Train with local processes, or with Ray: on the cluster at `address`, or on this machine's own.

    `stopping` hears the signals; without it they are as they were.

    Raises Unrecoverable when trying again is useless, Stopped when the ranks were asked to stop, RuntimeError when they failed
    more than `cluster.max_failures` times or could not be started.
    """
    stopping = stopping or Stopping()
    try:
        with stopping.asked_through(job.request):
            if local:
                _run_local(job)
            else:
                with redirect_stdout(sys.stderr):  # Ray prints there that a worker died; stdout is for results
                    _run_ray(job, address, stopping)
        if job.stopped.exists():
            raise Stopped(job.stopped.read_text(encoding="utf-8"))
    finally:
        forget(job)


def _run_local(job: Job) -> None:
    """`cluster.workers` processes of this machine; one worker runs in this very process."""
    from cluster import context

    world, gpu = job.config.cluster.most_workers, job.config.cluster.gpus_per_worker > 0
    if world == 1:
        worker_main(context.single(gpu=gpu), job)
        return
    for failures in range(job.config.cluster.max_failures + 1):
        try:
            run_ranks(world, partial(_rank, world=world, job=job), timeout_s=job.config.cluster.timeout_s)
            return
        except RankFailed as error:
            refuse_useless(job)
            attempts.ended(job.run, str(error), sure=error.killed)
            reason = attempts.word(job.run) or str(error)
            if failures == job.config.cluster.max_failures:
                raise RuntimeError(f"the workers failed {failures + 1} times; the last time: {reason}") from error
            logger.warning("the workers failed and start again from the last checkpoint: %s", reason)


def _rank(rank: int, folder: Path, *, world: int, job: Job) -> None:
    from cluster import context
    from trainer import collectives

    context.share_cores(world)
    settings = job.config.cluster
    interfaces.use(settings.interface)
    here = context.spawned(rank, world, folder / "store", gpu=settings.gpus_per_worker > 0, timeout_s=settings.timeout_s)
    worker_main(here, job)
    collectives.leave()
    context.finish()


def _run_ray(job: Job, address: str | None, stopping: Stopping) -> None:
    settings = job.config.cluster
    elastic = settings.least_workers < settings.most_workers
    # A lost node is still counted when the workers start again: those that can start wait this long for the others.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15" if elastic else "60")
    quiet_ray()
    import ray
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    started = not ray.is_initialized()
    if started:
        init_ray(address, settings.most_workers * settings.cpus_per_worker, otherwise="--local trains without Ray")
    stopping.listen()
    try:
        _refuse_too_small(job)
        if address is not None:  # on this machine's own Ray the driver has seen all of it
            preflight(job)
        resources = {"CPU": settings.cpus_per_worker}
        if settings.gpus_per_worker:
            resources["GPU"] = settings.gpus_per_worker
        trainer = TorchTrainer(
            _ray_rank,
            train_loop_config={"job": job},
            scaling_config=train.ScalingConfig(
                num_workers=settings.workers,
                elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker=resources,
                placement_strategy=settings.placement.upper(),
            ),
            torch_config=TorchConfig(backend="nccl" if settings.gpus_per_worker else "gloo", timeout_s=int(settings.timeout_s)),
            run_config=train.RunConfig(
                name=f"ray-{job.launch_id}",
                storage_path=str(job.run / ".ray"),
                failure_config=train.FailureConfig(max_failures=settings.max_failures),
                worker_runtime_env={"env_vars": interfaces.environment(settings.interface)} if settings.interface else None,
            ),
        )
        try:
            in_a_thread(trainer.fit)
        except train.TrainingFailedError as error:
            refuse_useless(job)
            raise RuntimeError(f"the workers failed: {attempts.word(job.run) or _last_line(str(error))}") from error
    finally:
        shutil.rmtree(job.run / ".ray", ignore_errors=True)
        if started:
            ray.shutdown()


def in_a_thread(work: Callable[[], object], meanwhile: Callable[[], object] = lambda: None, *, every_s: float = 0.5) -> None:
    """Call `work` and wait; `meanwhile` is called now and then. In the main thread Ray would take Ctrl-C for itself, and end
    the ranks before they could save.
    """
    raised: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, name="ray", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(every_s)  # signals are answered in between
        meanwhile()
    if raised:
        raise raised[0]


def _ray_rank(config: dict[str, Any]) -> None:
    from cluster import context

    job: Job = config["job"]
    worker_main(context.ray_worker(gpu=job.config.cluster.gpus_per_worker > 0), job)


def quiet_ray() -> None:
    """Ray's defaults talk much and wait long; what the user has set stays."""
    settings = {
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def init_ray(address: str | None, cpus: float, *, otherwise: str) -> None:
    """Connect to the cluster, or start one here with at least so many CPUs; `otherwise` tells what to do when neither works."""
    import ray

    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        have = os.cpu_count() or 1
        # A laptop may be asked for more workers than it has cores: slower, not wrong.
        options |= {
            "address": "local",
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "num_cpus": max(have, int(cpus)),
        }
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = address or "this machine"
        raise RuntimeError(f"cannot reach Ray at {where}: {_last_line(str(error))}; {otherwise}") from error


def _refuse_too_small(job: Job) -> None:
    import ray

    settings, deadline = job.config.cluster, time.monotonic() + job.config.cluster.start_timeout_s
    while True:
        try:
            capacity.refuse_too_small([node["Resources"] for node in ray.nodes() if node["Alive"]], settings)
            return
        except RuntimeError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{error} (waited {settings.start_timeout_s:g} s, cluster.start_timeout_s)") from error
        time.sleep(1)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
