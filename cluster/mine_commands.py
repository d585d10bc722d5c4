"""The command that makes triplets with hard negatives out of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.answers import Json, print_result
from cluster.embed_commands import MODEL_HELP

commands = typer.Typer()


@commands.command()
def mine(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Labelled images or pairs: a folder or URL with a manifest.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for shards of triplets.")],
    negatives: Annotated[int, typer.Option(help="Explicit negatives of a triplet, 1 to 8.")] = 1,
    depth: Annotated[int, typer.Option(min=1, help="Look at so many nearest images of other classes.")] = 50,
    skip: Annotated[int, typer.Option(min=0, help="Pass over so many of the very nearest: often wrong labels.")] = 0,
    pick: Annotated[str, typer.Option(help="Of those that are left, hardest or random ones.")] = "hardest",
    max_ratio: Annotated[
        float | None, typer.Option(help="Drop s_an > RATIO * s_ap, e.g. 0.95 (TopK-PercPos of NV-Retriever). s: cosines.")
    ] = None,
    max_score: Annotated[float | None, typer.Option(help="Drop s_an > SCORE.")] = None,
    margin: Annotated[
        float | None, typer.Option(help="Drop s_an > s_ap - MARGIN; 0: only negatives farther than the positive.")
    ] = None,
    positives: Annotated[
        str | None, typer.Option(help="Labelled data: random (default), hardest, easiest or all of the class.")
    ] = None,
    per_image: Annotated[int | None, typer.Option(min=1, help="Labelled data: positives, so triplets, of an image; 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is random, and of the order in the shards.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that embed and write.")] = 1,
    as_json: Json = False,
) -> None:
    """Find hard negatives for every image with a model and write triplets to train on. Stopped, the same command goes on.

    Example: nearfar mine runs/mine shards/mine/train shards/mined --negatives 2 --skip 1 --margin 0
    """
    from cluster.hard_negatives import Choice
    from cluster.mine import describe
    from cluster.mine import mine as run

    choice = Choice(negatives, skip, depth, pick, max_ratio, max_score, margin, seed)
    found = run(model, shards, out, choice=choice, positives=positives, per_image=per_image, workers=workers)
    print_result(found, as_json=as_json, text=describe(found))
