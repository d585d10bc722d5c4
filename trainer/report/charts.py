"""Curves as SVG that takes its colours from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[int, float]]

# colours that matplotlib writes, and the variables of the page that replace them
INK, FAINT = "#010101", "#010102"
LINES = ("#010103", "#010104", "#010105")
VARIABLES = {INK: "--muted", FAINT: "--line", LINES[0]: "--accent", LINES[1]: "--second", LINES[2]: "--third"}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
STYLE |= {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT}


def loss_chart(points: Points) -> str:
    """The loss of every logged step, faint, and its running mean."""

    def draw(axes: Axes) -> None:
        steps, values = [p[0] for p in points], [p[1] for p in points]
        if len(points) > 20:
            axes.plot(steps, values, color=LINES[0], alpha=0.28, linewidth=1)
            values = _running_mean(values, len(points) // 20)
        axes.plot(steps, values, color=LINES[0], linewidth=2)

    return _svg("loss", draw)


def metric_chart(curves: Mapping[str, Points]) -> str:
    """Up to three metrics between 0 and 1 over the steps, named at their ends."""

    def draw(axes: Axes) -> None:
        for color, (name, points) in zip(LINES, curves.items(), strict=False):
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=3.5, label=name)
        axes.set_ylim(0, 1)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.14), ncols=3, handlelength=1.2, columnspacing=1.2)

    return _svg("metrics", draw)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def _svg(name: str, draw: Callable[[Axes], None]) -> str:
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):  # without a salt the ids are random
        figure = Figure(figsize=(5.0, 2.9), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(
        r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :]
    )  # two drawings, one page: no id twice
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{name} over steps">', text, count=1)
