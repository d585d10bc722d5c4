"""Commands that use an encoder: images to vectors, and search among them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.answers import Json, print_result

commands = typer.Typer()
MODEL_HELP = "A run's folder, a checkpoint, an export, models:/NAME@ALIAS, or an MLflow run's id."


@commands.command()
def embed(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Shards, a folder of images, or a table; path or URL.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="Columns key, label, member, record, embedding.")],
    address: Annotated[str | None, typer.Option(metavar="URL", help="A running Ray cluster, e.g. ray://head:10001.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Processes of this machine, without Ray.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: one a CPU (or GPU); with --local one.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Records encoded together.")] = 256,
    gpus_per_worker: Annotated[float, typer.Option(min=0.0, help="Below 1: workers share a GPU.")] = 0.0,
    dim: Annotated[int | None, typer.Option(min=1, help="Keep this many numbers (matryoshka), scaled to length 1.")] = None,
    as_json: Json = False,
) -> None:
    """Turn images into vectors, one row each in the source's order. Stopped in the middle, the same command goes on.

    Example: nearfar embed runs/mine shards/mine/eval vectors.parquet
    """
    from cluster.embed import Place
    from cluster.embed import embed as run

    if local and address is not None:
        raise ValueError("--local and --address exclude each other")
    place = Place(local=local, address=address, workers=workers, gpus_per_worker=gpus_per_worker)
    found = run(model, source, out, place=place, batch=batch, dim=dim)
    speed = "" if found["images_per_s"] is None else f", {found['images_per_s']:.0f} images/s"
    again = f", {found['resumed_images']} were there already" if found["resumed_images"] else ""
    left = f"; {found['rejected']} left out, see {found['rejected_file']}" if found["rejected"] else ""
    text = f"{out}: {found['rows']} vectors of {found['dim']} numbers{speed}{again}{left}"
    print_result(found, as_json=as_json, text=text)


@commands.command()
def search(
    embeddings: Annotated[Path, typer.Argument(metavar="EMBEDDINGS.parquet", help="What `nearfar embed` wrote.")],
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="An image to look for; repeatable.")] = None,
    key: Annotated[list[str] | None, typer.Option(metavar="KEY", help="A row of the file to look for; repeatable.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to find.")] = 10,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Where the model is now, if not where it was.")] = None,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw queries and what was found.")] = None,
    index: Annotated[str, typer.Option(help="exact, or faiss: a graph beside the file, for many millions.")] = "exact",
    as_json: Json = False,
) -> None:
    """Find the nearest images, exactly; the model that made the file is known from it.

    Example: nearfar search vectors.parquet --image photo.jpg -k 5 --sheet found.png
    """
    from cluster.search import describe
    from cluster.search import search as run

    found = run(embeddings, images=image or (), keys=key or (), k=k, model=model, index=index, sheet=sheet)
    print_result(found, as_json=as_json, text=describe(found))
