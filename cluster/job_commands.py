"""`nearfar submit`, `jobs`, `logs` and `stop`: runs as jobs of a Ray cluster."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.answers import Json, print_result

commands = typer.Typer()
Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The cluster's dashboard, http://HOST:8265; or set RAY_API_SERVER_ADDRESS."),
]
Job = Annotated[str, typer.Argument(metavar="ID", help="A job's id, or the name of its run.")]


@commands.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see `nearfar recipes`.")],
    address: Address = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the log until it ends; exit with the job's code.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was not submitted from here.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Submit though the cluster is too small: nodes are to come.")] = False,
    code: Annotated[Path | None, typer.Option(metavar="DIR", help="Take along modules that the config names.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Leave such files of --code behind.")] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="For driver and workers; from here.")] = None,
    cpus: Annotated[float, typer.Option(min=0, help="Of the driver, which evaluates and exports.")] = 0,
    gpus: Annotated[float, typer.Option(min=0, help="Of the driver.")] = 0,
    memory_mb: Annotated[int, typer.Option(min=0, help="Of the driver.")] = 0,
    python: Annotated[str, typer.Option(help="The interpreter there.")] = "python",
    as_json: Json = False,
) -> None:
    """Train as a job of a Ray cluster; prints the job's id. Submitting the same run again finds it, or goes on with it.

    Example: nearfar submit mine.yaml --address http://head:8265 --set cluster.workers=8 --follow
    """
    from cluster.jobs.client import connect
    from cluster.jobs.submit import Options
    from cluster.jobs.submit import submit as submit_job
    from cluster.progress import say
    from configs.load import load_config

    loaded = load_config(config, overrides or ())
    options = Options(
        code=code,
        excludes=tuple(exclude or ()),
        env=_environment(env or []),
        python=python,
        cpus=cpus,
        gpus=gpus,
        memory_mb=memory_mb,
        resume=resume,
        wait=wait,
    )
    client = connect(address)
    done = submit_job(client, loaded, options)
    say(done.what)
    if not follow:
        say(f"`nearfar logs {done.id} -f` follows it, `nearfar stop {done.id}` stops it")
        print_result({"job": done.id, "new": done.new}, as_json=as_json, text=done.id)
        return
    if not as_json:
        print(done.id, flush=True)
    _follow(client, done.id, sys.stderr, as_json=as_json)


@commands.command()
def jobs(address: Address = None, as_json: Json = False) -> None:
    """The jobs that nearfar submitted to a cluster, the newest first.

    Example: nearfar jobs --address http://head:8265
    """
    from cluster.jobs.client import connect, details, jobs_of

    found = [details(job) for job in jobs_of(connect(address))]
    print_result({"jobs": found}, as_json=as_json, text=_table(found))


@commands.command()
def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until it ends; exit with the job's code.")] = False,
    tail: Annotated[int | None, typer.Option("-n", "--tail", min=1, help="Only the last lines.")] = None,
) -> None:
    """A job's log: what `nearfar train` says there.

    Example: nearfar logs mine --address http://head:8265 -f
    """
    from cluster.jobs.client import connect, find

    client = connect(address)
    id = str(find(client, job).submission_id)
    if follow:
        _follow(client, id, sys.stdout, as_json=False)
        return
    text = client.get_job_logs(id)
    lines = text.splitlines(keepends=True)
    print("".join(lines if tail is None else lines[-tail:]), end="")


@commands.command()
def stop(
    job: Job,
    address: Address = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="How long to wait for its end.")] = 150,
    as_json: Json = False,
) -> None:
    """Have a job save a checkpoint and stop. Submitting the same config again goes on from there.

    Example: nearfar stop mine --address http://head:8265
    """
    from cluster.jobs.client import ENDED, connect, find
    from cluster.jobs.follow import stop as stop_job

    client = connect(address)
    found = find(client, job)
    id, before = str(found.submission_id), str(found.status.value)
    status = before if before in ENDED else stop_job(client, id, timeout_s=timeout_s)
    told = f"job {id} had ended before: {status}" if before in ENDED else f"job {id}: {status}"
    told += "; submitting it again goes on" if status in ("STOPPED", "FAILED") else ""
    print_result({"job": id, "status": status}, as_json=as_json, text=told)
    if status not in ENDED:
        raise RuntimeError(f"job {id} has not ended within {timeout_s:g} s ({status}); it was asked to, `nearfar jobs` tells")


def _follow(client: Any, id: str, stream: Any, *, as_json: bool) -> None:
    """Until the job ends; then exit with its code. Ctrl-C leaves it alone."""
    from cluster.jobs.follow import follow as follow_job
    from cluster.run import Interrupted, JobFailed

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        ending = follow_job(client, id, write)
    except KeyboardInterrupt:
        raise Interrupted(
            f"detached; job {id} goes on: `nearfar logs {id} -f` follows it again, `nearfar stop {id}` stops it", 130
        ) from None
    if as_json:
        print_result({"job": id, "status": ending.status, "exit_code": ending.exit_code}, as_json=True, text="")
    if ending.status == "STOPPED":
        raise Interrupted(f"job {id} was stopped; submitting it again goes on", ending.exit_code)
    if ending.exit_code:
        raise JobFailed(f"job {id} failed: {ending.error}", ending.exit_code)


def _environment(given: list[str]) -> dict[str, str]:
    """NAME=VALUE, or NAME whose value is this shell's: so that secrets stand in no command line."""
    import os

    found = {}
    for one in given:
        name, has_value, value = one.partition("=")
        if not name.isidentifier():
            raise ValueError(f"--env {one}: NAME=VALUE is meant, or NAME for what it is here")
        if not has_value and name not in os.environ:
            raise ValueError(f"--env {name}: it is not set here; give --env {name}=VALUE or export it")
        found[name] = value if has_value else os.environ[name]
    return found


def _table(found: list[dict[str, Any]]) -> str:
    if not found:
        return "no jobs"
    header = f"{'job':40} {'status':10} {'exit':>4} {'took':>9}  run"
    return "\n".join([header, *(_line(job) for job in found)])


def _line(job: dict[str, Any]) -> str:
    took = "" if job["started"] is None else f"{(job['ended'] or time.time()) - job['started']:.0f} s"
    code = "" if job["exit_code"] is None else str(job["exit_code"])
    return f"{job['job']:40} {job['status']:10} {code:>4} {took:>9}  {job['run']}"
