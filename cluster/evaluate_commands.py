"""The command that measures a model on shards."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from cluster.answers import Json, print_result

commands = typer.Typer()


@commands.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a checkpoint, an export, models:/NAME@ALIAS or an MLflow run's id.")
    ],
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Images to search for: a folder or URL with a manifest.")],
    gallery: Annotated[
        str | None, typer.Option(metavar="SHARDS", help="Where to search; default: each image among all others of SHARDS.")
    ] = None,
    across: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="For keys, with one group: search among images where it catches something else."),
    ] = None,
    across_hides: Annotated[
        str, typer.Option(help="Of images with the same catch: all, or same_class (person re-identification).")
    ] = "all",
    queries: Annotated[
        str, typer.Option(help="Of pairs and triplets: all, anchors among positives, or positives among anchors.")
    ] = "all",
    metrics: Annotated[
        str, typer.Option(metavar="NAMES", help="all, retrieval, verification, folds, spread, clustering, or single metrics.")
    ] = "all",
    k: Annotated[str, typer.Option("--k", metavar="NUMBERS", help="Of recall@k.")] = "1,5,10,100",
    bootstrap: Annotated[
        int, typer.Option(min=0, metavar="N", help="Resamples of the classes for 95 % intervals; 0: none.")
    ] = 1000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    uri: Annotated[str | None, typer.Option(metavar="URI", help="MLflow's address, for models it holds.")] = None,
    log: Annotated[bool, typer.Option("--log", help="Also into MLflow: a run inside the one that trained the model.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a model: retrieval, verification, spread of the vectors, with intervals. Any number of workers, same numbers.

    Example: nearfar evaluate runs/emoji shards/emoji/eval --across '-([a-z]+)$' --k 1,10 --workers 2
    """
    from cluster.evaluating import Request, describe, run_evaluation
    from configs.evaluation import Evaluate
    from configs.load import parse_section

    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", k):
        raise ValueError(f"--k {k!r}: numbers with commas between them are meant, for instance 1,5,10")
    settings = {"metrics": metrics.split(","), "gallery": gallery, "across": across, "across_hides": across_hides}
    settings["queries"] = queries
    how = parse_section(Evaluate, settings, where="nearfar evaluate")
    request = Request(model, shards, how, tuple(map(int, k.split(","))), bootstrap, device, uri)
    result = run_evaluation(request, workers=workers)
    if log:
        from cluster.evaluation_runs import log_evaluation

        result["mlflow_run_id"] = log_evaluation(model, shards, result, uri=uri)
    print_result(result, as_json=as_json, text=describe(result))
