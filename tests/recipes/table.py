"""The results of `make recipes` as Markdown tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.recipes import is_done
from tests.recipes.plan import EMOJI, PLANNED, TEXT, Entry

Row = dict[str, Any]
ALSO = "also.json"  # in a run's folder: what the second evaluation gave
HEADS = {
    "fashion": (
        "Fashion-MNIST, three classes held out, 500 images of each (`dimensionality-reduction`: unseen digits; `ten-classes`: "
        "unseen images of all classes)"
    ),
    "emoji": "Emoji, a quarter of them held out: the same emoji by another hand",
    "text": "Images of unseen emoji to the texts of all unseen emoji, and back",
}


def table(runs: Path) -> str:
    """All that is done, by data set."""
    parts = {name: [entry for entry in PLANNED if _data_of(entry) == name] for name in HEADS}
    return (
        "\n\n".join(f"{HEADS[name]}\n\n{_rows(entries, runs, text=name == 'text')}" for name, entries in parts.items()) + "\n"
    )


def _data_of(entry: Entry) -> str:
    return "text" if entry.recipe in TEXT else "emoji" if entry.recipe in EMOJI else "fashion"


def _rows(entries: Sequence[Entry], runs: Path, *, text: bool) -> str:
    columns: dict[str, Callable[[Row], float]] = (
        {
            "image to text: recall@1": lambda row: row["metrics"]["recall_at_1"],
            "recall@10": lambda row: row["metrics"]["recall_at_10"],
            "text to image: recall@1": lambda row: row["also"]["recall_at_1"],
            "recall@10 back": lambda row: row["also"]["recall_at_10"],
        }
        if text
        else {
            "untrained": lambda row: row["before"]["recall_at_1"],
            "recall@1": lambda row: row["metrics"]["recall_at_1"],
            "MAP@R": lambda row: row["metrics"]["map_at_r"],
        }
    )
    lines = [f"| recipe | {' | '.join(columns)} | seconds |", "|" + " --- |" * (len(columns) + 2)]
    for entry in entries:
        found = [row for run, _ in entry.runs() if (row := read(runs / run)) is not None]
        if found:
            cells = [_spread([value(row) for row in found]) for value in columns.values()]
            if not text and found[0]["also"]:
                cells[-1] += f"; {', '.join(f'{name} {value:.3f}' for name, value in found[0]['also'].items())}"
            lines.append(f"| `{entry.name}` | {' | '.join(cells)} | {max(row['seconds'] for row in found):.0f} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def read(run: Path) -> Row | None:
    """What a run's folder tells: metrics before and after, and the seconds from the first step to the last evaluation."""
    if not is_done(run / "result.json"):
        return None
    result: Row = json.loads((run / "result.json").read_text())
    times = [json.loads(line)["time"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    also = run / ALSO
    result["seconds"] = times[-1] - times[0]
    result["also"] = json.loads(also.read_text()) if also.is_file() else {}
    return result
