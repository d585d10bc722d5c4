"""Curves and histograms: inline as SVG that takes its colours from the page, and as files of their own."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trainer.report.spread import BINS, Spread

Points = Sequence[tuple[int, float]]
WIDE, SMALL = (4.6, 2.7), (2.5, 1.6)  # inches
DRAWN_BINS = 50


@dataclass(frozen=True, slots=True)
class Colours:
    ink: str
    faint: str
    first: str
    second: str
    third: str


# what files have, and the variables of the page that replace it there
LIGHT = Colours("#5d6472", "#dfe3ea", "#3156d3", "#b4690e", "#0f8a76")
PAGE = Colours("var(--muted)", "var(--line)", "var(--accent)", "var(--second)", "var(--third)")


@dataclass(frozen=True, slots=True)
class Chart:
    """`inline` for the page, `svg` and `png` as files."""

    name: str
    title: str
    inline: str
    svg: bytes
    png: bytes


@dataclass(frozen=True, slots=True)
class Extent:
    """The steps of a run, and those at which its workers were started again."""

    last: int
    restarts: Sequence[int] = ()


def loss_chart(points: Points, extent: Extent) -> Chart:
    """The loss of every logged step, faint, and its running mean."""

    def draw(axes: Axes) -> None:
        steps, values = [p[0] for p in points], [p[1] for p in points]
        if len(points) > 20:
            axes.plot(steps, values, color=LIGHT.first, alpha=0.28, linewidth=1)
            values = _running_mean(values, len(points) // 20)
        axes.plot(steps, values, color=LIGHT.first, linewidth=2)

    return _over_steps("loss", "Loss", draw, extent, f"from {points[0][1]:.3g} to {points[-1][1]:.3g}")


def metric_chart(curves: Mapping[str, Points], extent: Extent) -> Chart:
    """Up to three metrics between 0 and 1 over the steps, named above."""

    def draw(axes: Axes) -> None:
        for color, (name, points) in zip((LIGHT.first, LIGHT.second, LIGHT.third), curves.items(), strict=False):
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=3.5, label=name, clip_on=False)
        axes.set_ylim(0, 1)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, handlelength=1.2, columnspacing=1.2)

    told = "; ".join(f"{name} from {points[0][1]:.3f} to {points[-1][1]:.3f}" for name, points in curves.items())
    return _over_steps("metrics", "Evaluation", draw, extent, told)


def mining_chart(curves: Mapping[str, Points], extent: Extent) -> Chart:
    """Shares that sum to 1 over the steps, stacked in the order given, at most three."""

    def draw(axes: Axes) -> None:
        steps = [point[0] for point in next(iter(curves.values()))]
        colors = (LIGHT.second, LIGHT.first, LIGHT.third)[: len(curves)]
        parts = [[point[1] for point in points] for points in curves.values()]
        axes.stackplot(steps, *parts, colors=colors, labels=list(curves), alpha=0.75, linewidth=0)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, handlelength=1.2, columnspacing=1.2)

    told = "; ".join(f"{name} from {points[0][1]:.1%} to {points[-1][1]:.1%}" for name, points in curves.items())
    return _over_steps("mining", "Mining", draw, extent, told)


def small_chart(name: str, title: str, points: Points, extent: Extent, *, percent: bool = False) -> Chart:
    """One quantity over the steps."""

    def draw(axes: Axes) -> None:
        axes.plot([p[0] for p in points], [p[1] for p in points], color=LIGHT.first, linewidth=1.6)
        axes.set_ylim(bottom=0)
        if percent:
            axes.set_ylim(0, max(0.05, 1.15 * max(p[1] for p in points)))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    return _over_steps(name, title, draw, extent, f"from {points[0][1]:.3g} to {points[-1][1]:.3g}", size=SMALL)


def spread_chart(name: str, title: str, spread: Spread, least: float) -> Chart:
    """Densities of the cosines of positive and negative pairs, from `least` to 1, or of their distances, from 0 to -`least`."""
    raw, (low, high) = spread.farthest > 0, spread.bounds

    def draw(axes: Axes) -> None:
        for counts, color, word in ((spread.negative, LIGHT.second, "different"), (spread.positive, LIGHT.first, "same")):
            shares = counts.reshape(-1, BINS // (2 * DRAWN_BINS)).sum(1) / max(1.0, float(counts.sum()))  # [2 * DRAWN_BINS]
            edges = [low + (high - low) * i / (2 * DRAWN_BINS) for i in range(2 * DRAWN_BINS + 1)]
            if raw:  # scores are minus the distance
                shares, edges = shares.flip(0), [-edge for edge in reversed(edges)]
            axes.stairs(shares.tolist(), edges, color=color, fill=True, alpha=0.2)
            axes.stairs(shares.tolist(), edges, color=color, linewidth=1.6, label=word)
        axes.set_xlim(*((0, -least) if raw else (least, 1)))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("euclidean distance" if raw else "cosine")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, handlelength=1.2, columnspacing=1.2)

    nearer = "" if spread.nearer is None else f"a pair of the same is nearer in {spread.nearer:.0%} of cases"
    return chart(name, title, draw, nearer, WIDE)


def _over_steps(
    name: str, title: str, draw: Callable[[Axes], None], extent: Extent, told: str, size: tuple[float, float] = WIDE
) -> Chart:
    def whole(axes: Axes) -> None:
        for step in extent.restarts:
            axes.axvline(step, color=LIGHT.ink, linewidth=0.8, linestyle=(0, (2, 3)))
        draw(axes)
        axes.grid(axis="y", color=LIGHT.faint, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(6 if size == WIDE else 3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5 if size == WIDE else 3))
        axes.set_xlim(0, max(extent.last, 1))
        axes.set_xlabel("step")

    return chart(name, title, whole, f"over steps, {told}", size)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def chart(name: str, title: str, draw: Callable[[Axes], None], told: str, size: tuple[float, float]) -> Chart:
    """What `draw` draws, in `size` inches; `told`: what it shows, for who cannot see it."""
    svg, png = _render(draw, size, name)
    inline = svg[svg.index("<svg") :]
    for field in Colours.__slots__:
        inline = inline.replace(getattr(LIGHT, field), getattr(PAGE, field))
    inline = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", inline)  # two drawings, one page: no id twice
    inline = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", inline)  # the page's own font
    inline = re.sub(r"<metadata>.*?</metadata>", "", inline, flags=re.DOTALL)
    head = rf'<svg \1 role="img" aria-label="{escape(f"{title} {told}")}">'
    inline = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', head, inline, count=1)
    return Chart(name, title, inline, svg.encode(), png)


def _render(draw: Callable[[Axes], None], size: tuple[float, float], name: str) -> tuple[str, bytes]:
    """SVG and PNG of one drawing."""
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9.5}  # ids are not random
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": LIGHT.faint, "axes.axisbelow": True}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), LIGHT.ink)
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.tick_params(length=0)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")  # it stays as it was laid out
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()
