"""Submits a run as a Ray job: the same run twice is one job, and one that was stopped or failed goes on."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import capacity
from cluster.deploy.refusals import secrets_in
from cluster.description import GIT, JOB, git_tags
from cluster.jobs import client as server
from cluster.jobs.client import ENDED, RUN, SETTINGS
from cluster.jobs.package import CONFIG, stage
from cluster.paths import absolute
from cluster.runfolder import RunFolder, flat
from cluster.store import redact
from configs.schema import RunConfig

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

AGENT_S = 20.0
STOP_WAIT_S = 120  # between SIGTERM and SIGKILL: time for a checkpoint and a last word to MLflow


@dataclass(frozen=True, slots=True)
class Options:
    """What a job needs beside its config; `cpus`, `gpus`, `memory_mb`: of the driver, which itself evaluates and exports."""

    code: Path | None = None
    excludes: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    python: str = "python"
    cpus: float = 0
    gpus: float = 0
    memory_mb: int = 0
    resume: bool = False
    wait: bool = False


@dataclass(frozen=True, slots=True)
class Submitted:
    """`id` of the job; `what` happened, as one sentence for a person."""

    id: str
    what: str
    new: bool


def submit(client: JobSubmissionClient, config: RunConfig, options: Options) -> Submitted:
    """Submit the run, or name the job that trains it already.

    Raises ValueError or RuntimeError for what the cluster would refuse.
    """
    config = absolute(config)
    if told := list(secrets_in(config)):
        raise ValueError("; ".join(told))
    run, settings = str(RunFolder.of(config).path), config.model_dump(mode="json", by_alias=True)
    before = [job for job in server.jobs_of(client) if (job.metadata or {})[RUN] == run]
    there = _there_already(before, settings)
    if there is not None:
        return there
    if not options.wait:
        _refuse_too_small(client, config, options)
    again = options.resume or bool(before)
    id = _next_id(config.name, run, before)
    metadata = {RUN: run, SETTINGS: json.dumps(settings)}
    with tempfile.TemporaryDirectory(prefix="nearfar-job-") as folder:
        stage(config, Path(folder), code=options.code, excludes=options.excludes)
        request = {
            "entrypoint": _entrypoint(options, resume=again),
            "submission_id": id,
            "runtime_env": {"working_dir": folder, "env_vars": _env(id, options)},
            "metadata": metadata,
            "entrypoint_num_cpus": options.cpus or None,
            "entrypoint_num_gpus": options.gpus or None,
            "entrypoint_memory": options.memory_mb * 2**20 or None,
        }
        try:
            _send(client, request)
        except Exception as error:
            if "already" in str(error) and "exist" in str(error):  # submitted by somebody else a moment ago
                return Submitted(id, f"job {id} was submitted a moment ago", new=False)
            raise RuntimeError(server.explain(client.get_address(), error)) from error
    gone_on = f"; it goes on where {before[0].submission_id} ended" if before else ""
    return Submitted(id, f"job {id} submitted to {redact(client.get_address())}{gone_on}", new=True)


def _send(client: JobSubmissionClient, request: Mapping[str, Any]) -> None:
    """A head that has just started has nobody yet who takes jobs: that is waited for."""
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            client.submit_job(**request)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)


def _entrypoint(options: Options, *, resume: bool) -> str:
    command = [shlex.quote(options.python), "-m", "cluster.entry", CONFIG, *(["--resume"] if resume else [])]
    return " ".join(["exec", *command])  # so that signals reach it, and not a shell


def _there_already(jobs: Sequence[JobDetails], settings: Mapping[str, Any]) -> Submitted | None:
    """The job that trains this very run, or has. Raises ValueError when the run's name is taken by another config."""
    for job in jobs:
        status, same = str(job.status.value), json.loads((job.metadata or {}).get(SETTINGS, "null")) == settings
        if status not in ENDED:
            if not same:
                raise ValueError(
                    f"job {job.submission_id} ({status}) trains this run with other settings: {_changed(job, settings)}; wait "
                    f"for it, `nearfar stop {job.submission_id}`, or choose another name"
                )
            return Submitted(str(job.submission_id), f"job {job.submission_id} trains this already ({status})", new=False)
        if status == "SUCCEEDED" and same and job is jobs[0]:
            return Submitted(
                str(job.submission_id),
                f"job {job.submission_id} has trained this already; choose another name to train it anew",
                new=False,
            )
    return None


def _changed(job: JobDetails, settings: Mapping[str, Any]) -> str:
    before, now = flat(json.loads((job.metadata or {}).get(SETTINGS, "{}"))), flat(settings)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r} there, {now.get(name)!r} here" for name in names[:3])


def _next_id(name: str, run: str, before: Sequence[JobDetails]) -> str:
    """nearfar-NAME, then nearfar-NAME-2, ... for those that go on with it; runs of one name in other places have other ids."""
    first = f"nearfar-{re.sub(r'[^A-Za-z0-9-]', '-', name)}-{zlib.crc32(run.encode()):08x}"
    taken = {str(job.submission_id) for job in before}
    number = 1
    while (id := first if number == 1 else f"{first}-{number}") in taken:
        number += 1
    return id


def _env(id: str, options: Options) -> dict[str, str]:
    return {
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        "PYTHONUNBUFFERED": "1",
        JOB: id,
        GIT: json.dumps(git_tags(Path.cwd())),
        **options.env,
    }


def _refuse_too_small(client: JobSubmissionClient, config: RunConfig, options: Options) -> None:
    """A job that waits for nodes which never come holds its place for minutes and then fails."""
    cluster, driver = config.cluster, {"CPU": options.cpus, "GPU": options.gpus}
    nodes = server.nodes_of(client)
    try:
        capacity.refuse_too_small(nodes, cluster, reserved=driver)
    except RuntimeError as error:
        raise ValueError(f"{error}; or submit with --wait if more nodes are to come") from error
