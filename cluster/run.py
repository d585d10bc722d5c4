"""One run from config to result: check, claim the folder, train, export, register, report."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from cluster import attempts, interfaces, launch, leakage, warm
from cluster.check import Facts, check, open_training
from cluster.context import refuse_few_gpus
from cluster.description import JOB, DatasetRef, git_tags
from cluster.disk import check_places
from cluster.job import Job
from cluster.outcome import conclude
from cluster.paths import absolute
from cluster.profile_table import WARM_UP
from cluster.progress import following, say
from cluster.resume import histories_of
from cluster.runfolder import RunFolder
from cluster.stopping import Stopping
from cluster.towers import with_input_dim
from cluster.tracking import Tracker
from configs.errors import DiskFull, Unrecoverable, naming_full_disk
from configs.schema import RunConfig
from pipelines.manifest import Manifest

AGAIN = "submitting it again goes on" if os.environ.get(JOB) else "`nearfar train CONFIG --resume` goes on"


class JobFailed(RuntimeError):
    """The run was accepted and then failed; `exit_code` for the shell."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(RuntimeError):
    """The run was told to stop; `exit_code` as the shell has it for the signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train(
    config: RunConfig,
    *,
    local: bool = False,
    address: str | None = None,
    resume: bool = False,
    accept_new_data: bool = False,
    profile: int = 0,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train, export, register and report; returns what result.json holds.

    `accept_new_data`: a run that is resumed goes on with what its data has grown by. Its number of steps stays.
    `profile`: how many steps to profile, soon after the start; that changes nothing in the result.
    `tags`: more of them for the MLflow run.
    Raises ValueError or RuntimeError for what is refused at the start, JobFailed for what breaks afterwards.
    """
    if accept_new_data and not resume:
        raise ValueError("--accept-new-data goes with --resume: a new run takes all data there is")
    config = absolute(config)
    folder = RunFolder.of(config)
    folder.refuse(config, resume=resume)
    before = folder.result()
    if before is not None and before["status"] == "FINISHED":
        say(f"run {config.name!r} is finished; nothing to do")
        return before
    if address is None and config.cluster.gpus_per_worker > 0:
        refuse_few_gpus(config.cluster.most_workers if local else config.cluster.least_workers)
    if address is None:
        interfaces.refuse_unknown(config.cluster.interface)
    check_places(config)  # before anybody looks for checkpoints there
    manifest = open_training(config)
    config = with_input_dim(config, manifest)
    if manifest.weighted:
        say("the records have weights, which no loss takes into account: all count alike")
    histories = histories_of(config, folder, manifest, accept_new_data=accept_new_data)
    facts = check(config, histories)
    if profile and profile + WARM_UP > facts.steps:
        raise ValueError(f"--profile {profile}: it begins after {WARM_UP} steps, and the run has {facts.steps}")
    tracker = _tracker(config, folder, manifest.kind, tags or {}) if config.tracking.enabled else None
    folder.claim(config)
    warm.keep(config, folder)
    if accept_new_data or not (folder.path / leakage.FILE).exists():
        leakage.check_run(config, manifest, folder.path)
    started = time.time()
    job = Job(config, folder.path, steps=facts.steps, histories=histories, launch_id=uuid.uuid4().hex[:8], profile=profile)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    stopping = Stopping()
    try:
        with stopping:
            if tracker is not None:
                tracker.start()
            _announce(config, facts, local=local, address=address)
            with following(folder, facts.steps):
                launch.run(job, stopping, local=local, address=address)
            with naming_full_disk(folder.path):
                result = conclude(config, folder, facts, tracker, started=started)
            status = "FINISHED"
            return result
    except launch.Stopped as stopped:
        status = "KILLED"
        raise Interrupted(f"{stopped}; {AGAIN} from there", stopping.exit_code) from stopped
    except (KeyboardInterrupt, SystemExit) as interrupt:
        status = "KILLED"
        attempts.ended(folder.path, stopping.reason, sure=True)
        raise Interrupted(f"interrupted; {AGAIN} from the last checkpoint", stopping.exit_code) from interrupt
    except Unrecoverable as error:
        raise JobFailed(f"run {config.name!r} stopped: {error}") from error
    except (RuntimeError, ValueError, OSError) as error:
        attempts.ended(folder.path, str(error))
        raise JobFailed(f"run {config.name!r} failed: {error}\nafter mending it, {AGAIN} from the last checkpoint") from error
    finally:
        if status != "FINISHED":
            with suppress(DiskFull):  # which is told of already
                folder.write_result({"status": status, "wall_s": time.time() - started})
            if tracker is not None:
                tracker.finish(status, timeout_s=10)


def _tracker(config: RunConfig, folder: RunFolder, kind: str, more: Mapping[str, str]) -> Tracker:
    datasets = [_dataset(source.path, "training", config.data.cache) for source in config.data.train]
    tags = {"nearfar.kind": kind, "nearfar.world_size": str(config.cluster.most_workers)}
    tags["nearfar.data_digest"] = " ".join(data.digest for data in datasets)
    if config.data.eval is not None:
        datasets.append(_dataset(config.data.eval, "evaluation", config.data.cache))
        tags["nearfar.eval_digest"] = datasets[-1].digest
    tags |= git_tags(Path.cwd()) | dict(more)
    if (job := os.environ.get(JOB)) is not None:
        tags["nearfar.job"] = job
    return Tracker(folder.path, config, tags=tags, datasets=datasets)


def _dataset(path: str, context: Literal["training", "evaluation"], cache: str | None) -> DatasetRef:
    manifest = Manifest.open(path, cache=cache)
    profile = {"records": manifest.num_samples, "images": manifest.num_images}
    return DatasetRef(name=Path(path).name, digest=manifest.digest, source=path, context=context, profile=profile)


def _announce(config: RunConfig, facts: Facts, *, local: bool, address: str | None) -> None:
    where = "local processes" if local else _ray_at(address)
    say(
        f"{config.name}: {facts.samples} {facts.kind} records, {facts.parameters / 1e6:.2f} M parameters, "
        f"{facts.steps} steps of {config.data.batch} ({facts.epochs:.1f} epochs), {_how_many(config)} workers, {where}"
    )


def _how_many(config: RunConfig) -> str:
    least, most = config.cluster.least_workers, config.cluster.most_workers
    return str(most) if least == most else f"{least} to {most}"


def _ray_at(address: str | None) -> str:
    return "Ray on this machine" if address is None else "Ray of this cluster" if address == "auto" else f"Ray at {address}"
