"""The command that reckons on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.answers import Json, print_result

commands = typer.Typer()


@commands.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see `nearfar recipes`.")],
    world: Annotated[str, typer.Option(metavar="N[,N...]", help="Numbers of GPUs, side by side.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="v100, t4, a100-40, a100-80, l4, l40s, h100, h200, b200; cpu: a core here.")
    ] = "h100",
    encoder: Annotated[
        str | None, typer.Option(help="Plan with vit-b16, vit-l14, resnet50, ... in place of the config's.")
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the GPU's peak that the encoder reaches.")] = 0.4,
    link_gbps: Annotated[
        float | None, typer.Option(min=0.001, help="Gbit/s between GPUs of a node; default: the GPU's.")
    ] = None,
    node_gbps: Annotated[float, typer.Option(min=0.001, help="Gbit/s out of a node, all its cards together.")] = 400,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    storage_gb_s: Annotated[float | None, typer.Option(min=0.001, help="GB/s that the storage gives to all nodes.")] = None,
    cores_per_gpu: Annotated[float | None, typer.Option(min=0.1, help="CPU cores that decode for a GPU.")] = None,
    decode_rate: Annotated[float | None, typer.Option(min=0.1, help="Images/s of a core; default: measured if local.")] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0.0)] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Plan without data: so many records.")] = None,
    image_kb: Annotated[float, typer.Option(min=0.001, help="Size of an image then.")] = 100,
    kind: Annotated[str, typer.Option(help="Their kind: labelled, pair, labelled_pair or triplet.")] = "pair",
    classes: Annotated[int | None, typer.Option(min=2, help="Their classes, for losses with class centres.")] = None,
    as_json: Json = False,
) -> None:
    """Reckon memory, traffic, time, reading and cost on any number of GPUs, and say what limits each.

    Example: nearfar plan mine.yaml --world 8,64,1024 --gpu h100 --price-per-gpu-hour 2.5
    """
    from cluster.plan.command import Options, run_plan
    from cluster.plan.facts import Told

    options = Options(
        gpu=gpu,
        encoder=encoder,
        mfu=mfu,
        link_gbps=link_gbps,
        node_gbps=node_gbps,
        gpus_per_node=gpus_per_node,
        storage_gb_s=storage_gb_s,
        cores_per_gpu=cores_per_gpu,
        decode_rate=decode_rate,
        price=price_per_gpu_hour,
        told=Told(samples, image_kb, kind, classes),
    )
    result, text = run_plan(config, overrides or (), world, options)
    print_result(result, as_json=as_json, text=text)
