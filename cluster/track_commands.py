"""Commands about what MLflow knows of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.answers import Json, print_result

track = typer.Typer(no_args_is_help=True, help="What MLflow knows of a run.")


@track.callback()
def _track() -> None:
    """Makes `sync` a command of its own: typer would take the only one for the whole group."""


@track.command()
def sync(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    uri: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow's address, where it is another than in training.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send what MLflow missed of a run that has ended: metrics, params, final status, artifacts.

    Can be repeated: what is there stays, once. A run whose driver was killed gets the status KILLED. A run that is still
    being trained is refused: it sends by itself. Exit 1 when MLflow does not answer; what has not arrived stays in RUN.

    Example: nearfar track sync runs/emoji
    """
    from cluster.progress import bar, say
    from cluster.sync import sync as send

    with bar("sending", "rows") as report:
        done = send(run.absolute(), uri=uri, progress=report)
    if as_json or done.error is None:
        print_result(done.as_dict(), as_json=as_json, text=done.describe())
    if done.error is not None:
        say(f"nearfar: {done.describe()}")
        sys.exit(1)
