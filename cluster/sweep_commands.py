"""The command that looks for good settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.answers import Json, print_result

commands = typer.Typer()


@commands.command()
def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; what SPACE does not decide stays.")],
    space: Annotated[Path, typer.Option(metavar="FILE", help="YAML: `optim.lr: {loguniform: [1e-4, 1e-2]}` and so on.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="How many; default 10, or all of a grid.")] = None,
    metric: Annotated[str | None, typer.Option(help="What decides; default: the config's tracking.promote.metric.")] = None,
    asha: Annotated[bool, typer.Option("--asha/--no-asha", help="Stop bad trials early.")] = True,
    grace_steps: Annotated[
        int | None, typer.Option(min=1, help="None is stopped before; default: a ninth of the steps.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Trials at once, at most; default: as many as fit.")] = None,
    address: Annotated[str | None, typer.Option(metavar="URL", help="A running Ray cluster, e.g. ray://head:10001.")] = None,
    name: Annotated[str | None, typer.Option(help="Folder in the storage; default: the config's name and -sweep.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn from SPACE.")] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Go on with trials that failed, too.")] = False,
    as_json: Json = False,
) -> None:
    """Train a config with many settings and write the best one's. Stopped in the middle, the same command goes on.

    Example: nearfar sweep mine.yaml --space space.yaml --trials 20
    """
    from cluster.sweep import run
    from cluster.sweep_plan import Wish, make
    from cluster.sweep_state import table

    wish = Wish(space, tuple(overrides or ()), name, trials, metric, seed, asha, grace_steps)
    plan = make(config, wish)
    result, found = run(plan, parallel=parallel, address=address, retry_failed=retry_failed)
    best = result["best"]
    text = (
        f"{table(plan, found)}\nbest: {best['trial']}; train it with  nearfar train {best['config']}"
        if best
        else table(plan, found)
    )
    print_result(result, as_json=as_json, text=text)
