"""RUN/report/index.html: one file that opens anywhere, without a network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainer.report.charts import loss_chart, metric_chart
from trainer.report.contact import data_url, montage
from trainer.report.data import ReportData, read_series

CURVES = ("recall_at_1", "recall_at_5", "recall_at_10")


def write_report(run: Path, data: ReportData) -> Path:
    """Write RUN/report/index.html, and neighbours.png beside it when there are sheets; returns the page's path.

    The curves come from RUN/metrics.jsonl (`train/loss`, `val/...`). Raises RuntimeError when the disk refuses.
    """
    series = read_series(run / "metrics.jsonl")
    loss = series.get("train/loss", [])
    curves = {label(name): series[f"val/{name}"] for name in CURVES if f"val/{name}" in series}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    environment.globals.update(data_url=data_url, label=label, duration=duration)
    html = environment.get_template("page.html").render(
        data=data,
        rows=compare(data.before, data.after),
        loss=Markup(loss_chart(loss)) if len(loss) > 1 else "",
        metrics=Markup(metric_chart(curves)) if curves else "",
        hits=[sum(n.right for n in sheet.neighbours) for sheet in data.sheets],
    )
    folder = run / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if data.sheets:
            _write(folder / "neighbours.png", montage(data.sheets))
        _write(folder / "index.html", html.encode("utf-8"))
    except OSError as error:
        raise RuntimeError(f"the report could not be written to {folder}: {error}") from error
    return folder / "index.html"


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, float | None, float]]:
    """(name, before or None, after) of every metric that lies between 0 and 1; recall@1, the headline, first."""
    names = sorted((name for name, value in after.items() if 0 <= value <= 1), key=lambda name: name != "recall_at_1")
    return [(label(name), before.get(name), after[name]) for name in names]


def label(name: str) -> str:
    """`recall_at_1` -> `Recall@1`, `map_at_r` -> `MAP@R`."""
    head, _, tail = name.rpartition("/")[2].partition("_at_")
    head = "MAP" if head == "map" else head.replace("_", " ").capitalize()
    return f"{head}@{tail.upper()}" if tail else head


def duration(seconds: float) -> str:
    """`134.2` -> `2 min 14 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
