"""The command line. Commands import their work when they run, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.answers import Json
from cluster.answers import print_result as _print
from cluster.data_commands import commands
from cluster.deploy_commands import deploy
from cluster.embed_commands import commands as embed_commands
from cluster.evaluate_commands import commands as evaluate_commands
from cluster.export_commands import commands as export_commands
from cluster.job_commands import commands as job_commands
from cluster.mine_commands import commands as mine_commands
from cluster.plan_commands import commands as plan_commands
from cluster.runs_commands import runs
from cluster.sweep_commands import commands as sweep_commands
from cluster.track_commands import track

app = typer.Typer(
    name="nearfar",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train image embeddings on pairs, triplets and labelled images, with negatives from the whole global batch.",
)
app.add_typer(commands)
app.add_typer(evaluate_commands)
app.add_typer(embed_commands)
app.add_typer(mine_commands)
app.add_typer(export_commands)
app.add_typer(job_commands)
app.add_typer(deploy, name="deploy")
app.add_typer(plan_commands)
app.add_typer(sweep_commands)
app.add_typer(runs, name="runs")
app.add_typer(track, name="track")

INTERRUPTED = 130
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see `nearfar recipes`.")]


def main() -> None:
    """Entry point: one message and exit code 2 for the user's mistakes, 1 for a job that failed."""
    try:
        if app(standalone_mode=False) == INTERRUPTED:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
    except (typer.Abort, KeyboardInterrupt):
        again = "; `nearfar train CONFIG --resume` goes on from the last checkpoint" if sys.argv[1:2] == ["train"] else ""
        _fail(f"interrupted{again}", INTERRUPTED)
    except Exception as error:
        if os.environ.get("NEARFAR_DEBUG"):
            raise
        usage = getattr(error, "show", None)  # click's own: unknown option, missing argument
        if callable(usage):
            usage()
            sys.exit(2)
        if type(error).__name__ == "JobFailed":
            _fail(str(error), getattr(error, "exit_code", 1))
        if type(error).__name__ == "Interrupted":
            _fail(str(error), getattr(error, "exit_code", INTERRUPTED))
        if isinstance(error, (ValueError, RuntimeError, OSError)):
            _fail(str(error), 2)
        raise


def _fail(message: str, code: int) -> None:
    print(f"nearfar: {message}", file=sys.stderr)
    sys.exit(code)


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="emoji or digits.")] = "emoji",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where images, shards and runs go.")] = Path("demo"),
    workers: Annotated[int, typer.Option(min=1)] = 2,
    minutes: Annotated[float, typer.Option(min=0.05, help="Training time; turned into steps before training starts.")] = 2.5,
) -> None:
    """Fetch real images, train, and show recall on classes never seen, before and after.

    Example: nearfar demo --data emoji --minutes 2.5
    """
    from cluster.demo import run_demo

    print(run_demo(data, out.absolute(), workers=workers, minutes=minutes))


@app.command()
def check(
    config: Config,
    overrides: Set = None,
    exact: Annotated[bool, typer.Option("--exact", help="Also compare two ranks with one process; exit 1 if unequal.")] = False,
    as_json: Json = False,
) -> None:
    """Refuse what can be refused before a worker starts: settings, data, batch, encoder, loss, disk; estimate memory.

    Example: nearfar check configs/recipes/emoji.yaml --set data.batch=512 --exact
    """
    from cluster.check import check as check_config
    from cluster.paths import absolute
    from configs.load import load_config

    loaded = absolute(load_config(config, overrides or ()))
    facts = check_config(loaded)
    text = (
        f"{config}: good. {facts.samples} {facts.kind} records ({facts.eval_samples} to evaluate), {facts.steps} steps = "
        f"{facts.epochs:.1f} epochs, {facts.parameters / 1e6:.2f} M parameters, "
        f"about {facts.worker_bytes / 2**20:.0f} MiB a worker"
    )
    if not exact:
        return _print(facts.as_dict(), as_json=as_json, text=text)
    from cluster.exact import describe, measure

    found = measure(loaded)
    _print({**facts.as_dict(), "exact": found.as_dict()}, as_json=as_json, text=f"{text}\n{describe(found)}")
    return None if found.exact else sys.exit(1)


@app.command()
def train(
    config: Config,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this name.")] = False,
    accept_new_data: Annotated[bool, typer.Option("--accept-new-data", help="Resume on data that has grown.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Processes of this machine, without Ray.")] = False,
    address: Annotated[str | None, typer.Option(metavar="URL", help="A running Ray cluster, e.g. ray://head:10001.")] = None,
    profile: Annotated[
        int, typer.Option(metavar="N", min=0, max=1000, help="Profile N steps: a table and traces in RUN/profile.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Train, evaluate, export, register and report. Ray on this machine by default.

    Example: nearfar train configs/recipes/emoji.yaml --set train.steps=300
    """
    from configs.load import load_config

    if local and address is not None:
        raise ValueError("--local and --address exclude each other")
    loaded = load_config(config, overrides or ())
    from cluster.outcome import describe
    from cluster.run import train as run

    result = run(loaded, local=local, address=address, resume=resume, accept_new_data=accept_new_data, profile=profile)
    _print(result, as_json=as_json, text=describe(result))


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")], as_json: Json = False) -> None:
    """Write a run's HTML report, of what is there so far, and print where it lies.

    Example: nearfar report runs/emoji
    """
    from cluster.reporting import rewrite_report

    page = str(rewrite_report(run.absolute()))
    _print({"report": page}, as_json=as_json, text=page)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one.")] = None,
    data: Annotated[bool, typer.Option("--data", help="Make its data in this folder: the commands in its head.")] = False,
) -> None:
    """List the shipped recipes, print one, or make its data. `nearfar train NAME` trains one as it is.

    Example: nearfar recipes emoji > my.yaml
    Example: nearfar recipes batch-hard --data && nearfar train batch-hard --local
    """
    from cluster.recipes import make_data, names, text_of, title

    if name is None:
        if data:
            raise ValueError("--data: of which recipe? nearfar recipes NAME --data")
        for one in names():
            print(f"{one:34} {title(one)}")
    elif data:
        text_of(name)
        make_data(name, Path.cwd())
    else:
        print(text_of(name), end="")


@app.command()
def ui(
    storage: Annotated[Path, typer.Argument(metavar="STORAGE", help="The storage folder of your runs.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow page of the runs in a storage folder, on this machine only.

    Example: nearfar ui runs --port 5000
    """
    from cluster.store import serve_ui

    serve_ui(storage.absolute(), port)


if __name__ == "__main__":
    main()
