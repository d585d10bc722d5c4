"""Commands about the runs in a storage folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.answers import Json, print_result

runs = typer.Typer(no_args_is_help=True, help="The runs in a storage folder: list, compare, prune.")
Storage = Annotated[Path, typer.Argument(metavar="STORAGE", help="The storage folder of your runs.")]


@runs.command("list")
def list_runs(storage: Storage = Path("runs"), as_json: Json = False) -> None:
    """All runs, the oldest first: status, steps, recall@1 before and after, time, registered version, age.

    Example: nearfar runs list demo/runs
    """
    from cluster.run_table import lined_up, row, runs_in

    found = [row(run) for run in runs_in(storage.absolute())]
    head = ("run", "status", "steps", "recall@1", "time", "model", "age")
    lines = [
        (
            one.name,
            one.status,
            str(one.steps),
            _from_to(one.before, one.after),
            _span(one.wall_s),
            one.model or "-",
            _span(one.age_s),
        )
        for one in found
    ]
    text = lined_up([head, *lines]) if found else f"no runs in {storage}"
    print_result({"runs": [one.as_dict() for one in found]}, as_json=as_json, text=text)


@runs.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs, or names in --storage; two or more.")],
    storage: Annotated[Path, typer.Option(help="Where names are looked up.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Metrics side by side, and the settings in which the runs differ.

    Example: nearfar runs compare emoji emoji-2 --storage demo/runs
    """
    from cluster.run_table import differing, find, lined_up, measured

    if len(names) < 2:
        raise ValueError("comparing takes two runs or more")
    chosen = [find(name, storage.absolute()) for name in names]
    metrics = [measured(run) for run in chosen]
    keys = dict.fromkeys(key for one in metrics for key in one)
    settings = differing(chosen)
    table = [("", *(run.path.name for run in chosen))]
    table += [(key, *("-" if key not in one else f"{one[key]:.5g}" for one in metrics)) for key in keys]
    table += [("", *("" for _ in chosen)), ("settings that differ", *("" for _ in chosen))] if settings else []
    table += [(key, *("-" if value is None else str(value) for value in values)) for key, values in settings.items()]
    found = {"runs": [str(run.path) for run in chosen], "metrics": metrics, "settings": settings}
    print_result(found, as_json=as_json, text=lined_up(table))


@runs.command()
def prune(
    storage: Storage = Path("runs"),
    keep: Annotated[int | None, typer.Option(min=0, metavar="N", help="The newest N runs stay as they are.")] = None,
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Only runs that nothing was written to for so long.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes/--dry-run", help="Remove it; without, only tell.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what runs no longer need: checkpoints of finished ones, and exports that the registry has.

    Stays: all that is running, the newest checkpoint of a run that broke off, an export that is the only copy of its model,
    configs, metrics, reports, and everything in MLflow.

    Example: nearfar runs prune runs --keep 5 --yes
    """
    from cluster.progress import say
    from cluster.run_prune import carry_out, chosen, plan
    from cluster.run_table import runs_in

    if keep is None and older_than is None:
        raise ValueError("say which runs to keep: --keep N, or --older-than DAYS, or both")
    planned = [plan(run) for run in chosen(runs_in(storage.absolute()), keep=keep, older_than=older_than)]
    done = [one for one in planned if not yes or not (one.checkpoints or one.folders) or carry_out(one)]
    for one in planned:
        if one not in done:
            say(f"{one.run} has been taken up meanwhile: left alone")
    nbytes = sum(one.nbytes for one in done)
    lines = [
        f"{Path(one.run).name}: {len(one.checkpoints)} checkpoints, {len(one.folders)} exports, "
        f"{one.nbytes / 2**20:.1f} MiB ({one.why})"
        for one in done
    ]
    tail = "freed" if yes else "would be freed; --yes removes them"
    found = {"removed": yes, "nbytes": nbytes, "runs": [one.as_dict() for one in done]}
    print_result(found, as_json=as_json, text="\n".join([*lines, f"{nbytes / 2**20:.1f} MiB {tail}"]))


def _from_to(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{before:.3f} -> {after:.3f}"


def _span(seconds: float | None) -> str:
    """In the largest unit that leaves at least 2."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
