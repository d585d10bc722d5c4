"""`make recipes`: trains every recipe on two workers and prints what came out. What is done already is not done again.

python -m tests.recipes FOLDER [NAME...]     # only these; the table is of all that is done
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cluster.recipes import is_done, make_data, run
from tests.recipes.plan import PLANNED, Entry
from tests.recipes.table import ALSO, table

SPARE = ("finish.report=false", "finish.onnx=false", "tracking.enabled=false")  # changes nothing of what is measured


def main() -> None:
    folder, *names = sys.argv[1:]
    place = Path(folder).absolute()
    for entry in PLANNED:
        if not names or entry.name in names:
            try:
                make_data(entry.recipe, place)
                run([shlex.split(command) for command in entry.data], place)
            except RuntimeError as error:
                sys.exit(f"{entry.name}: {error}")
            for name, seed in entry.runs():
                _train(entry, name, seed, place)
    text = table(place / "runs")
    (place / "recipes.md").write_text(text, "utf-8")
    print(text)


def _train(entry: Entry, name: str, seed: int, place: Path) -> None:
    folder = place / "runs" / name
    if not is_done(folder / "result.json"):
        shutil.rmtree(folder, ignore_errors=True)  # of one that was stopped, the seconds would be wrong
        settings = [f"name={name}", f"seed={seed}", *SPARE, *entry.settings]
        _nearfar(place, "train", entry.recipe, "--local", *(part for one in settings for part in ("--set", one)))
    also = folder / ALSO
    if entry.also and not also.is_file():
        answer = _nearfar(place, "evaluate", str(folder), *entry.also, "--bootstrap", "0", "--json")
        also.write_text(json.dumps(json.loads(answer)["metrics"]))


def _nearfar(place: Path, *arguments: str) -> str:
    print("nearfar", *arguments, file=sys.stderr, flush=True)
    program = Path(sys.executable).with_name("nearfar")
    done = subprocess.run([program, *arguments], cwd=place, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"nearfar {' '.join(arguments)} ended with {done.returncode}; after mending it, the same command goes on")
    return done.stdout


if __name__ == "__main__":
    main()
