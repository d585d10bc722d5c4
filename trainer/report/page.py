"""RUN/report/index.html: one file that opens anywhere, without a network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainer.report import words
from trainer.report.atlas import map_charts
from trainer.report.charts import Chart, Extent, loss_chart, metric_chart, mining_chart, small_chart, spread_chart
from trainer.report.contact import data_url, montage, of_clusters, of_sheets
from trainer.report.data import ReportData, mining_series, read_series
from trainer.report.insight import Insight
from trainer.report.scatter import scatter_charts

CURVES = ("recall_at_1", "recall_at_5", "map_at_r")
SMALL = (
    ("train/lr", "Learning rate", False),
    ("train/images_per_s", "Images a second", False),
    ("train/wait_share", "Waiting for data", True),
    ("train/grad_norm", "Gradient norm", False),
)
HERE = Path(__file__).parent
Series = Mapping[str, Sequence[tuple[int, float]]]


def write_report(run: Path, data: ReportData) -> Path:
    """Write RUN/report/index.html, and its plots beside it as SVG and PNG; returns the page's path.

    The curves come from RUN/metrics.jsonl (`train/...`, `val/...`). Raises RuntimeError when the disk refuses.
    """
    series = read_series(run / "metrics.jsonl")
    charts = {
        "main": _main(series, data),
        "small": _small(series, data),
        "spreads": _spreads(data.insight),
        "maps": _maps(data.insight),
    }
    files = {"index.html": _page(data, series, charts).encode("utf-8")}
    for chart in (chart for group in charts.values() for chart in group):
        files |= {f"{chart.name}.svg": chart.svg, f"{chart.name}.png": chart.png}
    files |= _sheets(data.insight) if data.insight else {}
    folder = run / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write(folder / name, content)
    except OSError as error:
        raise RuntimeError(f"the report could not be written to {folder}: {error}") from error
    return folder / "index.html"


def _page(data: ReportData, series: Series, charts: Mapping[str, Sequence[Chart]]) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(data_url=data_url, duration=words.duration, number=words.number)
    rows = words.rows(data.before, data.after, data.headline)
    waits = [value for _, value in series.get("train/wait_share", [])]
    speeds = sorted(value for _, value in series.get("train/images_per_s", []))
    return environment.get_template("page.html").render(
        data=data,
        insight=data.insight,
        rows=rows,
        verdict=words.verdict(data, rows, list(series.get("train/loss", []))),
        charts={name: [(chart.title, Markup(chart.inline)) for chart in group] for name, group in charts.items()},
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        wait=sum(waits) / len(waits) if waits else None,
        speed=speeds[len(speeds) // 2] if speeds else None,
        skipped=max((value for _, value in series.get("train/skipped", [])), default=0),
        leaks=_leaks(data.leakage),
    )


def _main(series: Series, data: ReportData) -> list[Chart]:
    extent = _extent(series, data)
    loss, charts = series.get("train/loss", []), []
    if len(loss) > 1:
        charts.append(loss_chart(loss, extent))
    curves = {words.label(name): series[f"val/{name}"] for name in CURVES if f"val/{name}" in series}
    charts += [metric_chart(curves, extent)] if curves else []
    mined = mining_series(series)
    return [*charts, mining_chart(mined, extent)] if len(next(iter(mined.values()), ())) > 1 else charts


def _small(series: Series, data: ReportData) -> list[Chart]:
    extent = _extent(series, data)
    present = [(name, title, percent) for name, title, percent in SMALL if len(series.get(name, [])) > 1]
    return [
        small_chart(name.rpartition("/")[2], title, series[name], extent, percent=percent) for name, title, percent in present
    ]


def _extent(series: Series, data: ReportData) -> Extent:
    last = max((points[-1][0] for points in series.values()), default=1)
    return Extent(last, [start.from_step for start in data.health.starts[1:]])


def _spreads(insight: Insight | None) -> list[Chart]:
    known = [(name, spread) for name, spread in (("before", insight and insight.before), ("after", insight and insight.after))]
    found = [(name, spread) for name, spread in known if spread and spread.nearer is not None]
    least = min((spread.least for _, spread in found if not spread.farthest), default=-1.0)
    return [
        spread_chart(
            f"{'distances' if spread.farthest else 'cosines'}-{name}",
            f"{name.capitalize()} training",
            spread,
            spread.least if spread.farthest else least,  # distances before and after are not of one scale
        )
        for name, spread in found
    ]


def _maps(insight: Insight | None) -> list[Chart]:
    if insight is not None and insight.flat is not None:
        return scatter_charts(insight.flat)
    return map_charts(insight.map) if insight and insight.map else []


def _sheets(insight: Insight) -> dict[str, bytes]:
    rows = {
        "neighbours.png": of_sheets(insight.sheets),
        "mistakes.png": of_sheets(insight.mistakes),
        "confusion.png": of_clusters([cluster for cluster in insight.clusters if cluster.members]),
    }
    return {name: montage(tiles) for name, tiles in rows.items() if tiles}


def _leaks(leakage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """leakage.json for the page: how many images and how many pairs of each kind, and the first pairs."""
    if leakage is None:
        return None
    pairs = sorted(leakage.get("pairs", ()), key=lambda pair: -float(pair.get("score") or 0))
    counts = Counter(str(pair.get("kind")) for pair in pairs)
    images = len({pair.get("eval") for pair in pairs})
    return {"counts": counts, "images": images, "pairs": pairs[:20], "checked": leakage.get("checked") or {}}


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
