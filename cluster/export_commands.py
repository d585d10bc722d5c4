"""The command that lets a model go out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.answers import Json, print_result

commands = typer.Typer()


@commands.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run folder, a checkpoint, an exported folder, models:/NAME@ALIAS, or an MLflow run id."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the folder goes; of a run by default RUN/export.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Run by onnxruntime, or by torch.")] = True,
    register: Annotated[str | None, typer.Option(metavar="NAME", help="Register it in MLflow under this name.")] = None,
    alias: Annotated[str | None, typer.Option(help="Moved to it if it is better; champion, or the run's own.")] = None,
    metric: Annotated[str | None, typer.Option(help="By which it must be better; recall_at_1, or the run's own.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Move the alias even if it is no better.")] = False,
    uri: Annotated[str | None, typer.Option(metavar="URI", help="MLflow's address; default: the run's own.")] = None,
    as_json: Json = False,
) -> None:
    """Write an encoder as a folder that needs no nearfar, prove that it is the same, and register it.

    Of a model that is registered already, --register makes a version of another name: a promotion, for instance from dev to
    prod. Its alias moves if the version is better than the one that has it.

    Example: nearfar export runs/emoji --register emoji
    """
    from cluster.shipping import Wish, describe, ship

    found = ship(model, Wish(out, onnx, register, alias, metric, force, uri))
    print_result(found, as_json=as_json, text=describe(found))
