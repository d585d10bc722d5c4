"""The shipped recipes: what there is, and the data that each of them is for."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.progress import say
from configs.load import RECIPES
from configs.plain import suggest

PRODUCT = {"fetch": 1, "pack": 1, "text": 1, "embed": 2, "mine": 2}  # which argument, from 0, is what a command makes


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def title(name: str) -> str:
    """The recipe in a line."""
    return text_of(name).splitlines()[0].lstrip("# ")


def text_of(name: str) -> str:
    """Raises ValueError for an unknown name."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no recipe {name!r}; {suggest(name, names())}")
    return path.read_text(encoding="utf-8")


def commands(name: str) -> list[list[str]]:
    """The commands in a recipe's head that make its data, without `nearfar`, in their order."""
    lines = [line.removeprefix("#").strip() for line in text_of(name).splitlines() if line.startswith("#   nearfar ")]
    return [shlex.split(line)[1:] for line in lines]


def make_data(name: str, folder: Path) -> None:
    """Run those commands in `folder`, but for what is made already. Raises RuntimeError when one of them fails."""
    found = commands(name)
    if not found:
        say(f"{name} is for images of your own: see its first lines")
    run(found, folder)


def run(found: Sequence[list[str]], folder: Path) -> None:
    """The same for commands of one's own."""
    folder.mkdir(parents=True, exist_ok=True)
    for command in found:
        product = product_of(command)
        if is_done(folder / product):
            say(f"{product} is there")
            continue
        if command[0] == "train" and (folder / product).parent.exists():
            command = [*command, "--resume"]  # it was stopped
        say(f"nearfar {shlex.join(command)}")
        here = str(Path(__file__).parents[1])
        paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", *command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"nearfar {shlex.join(command)} failed; what was made before it stays")


def is_done(product: Path) -> bool:
    """Whether it is there; the result of a run only when that came to its end."""
    if product.name != "result.json" or not product.is_file():
        return product.exists()
    return bool(json.loads(product.read_text("utf-8")).get("status") == "FINISHED")


def product_of(command: list[str]) -> Path:
    """The file or folder that is there once a command of a recipe's head is done."""
    name, *arguments = command
    if name == "train":
        return Path("runs", arguments[0], "result.json")
    return Path([argument for argument in arguments if not argument.startswith("--")][PRODUCT[name]])
