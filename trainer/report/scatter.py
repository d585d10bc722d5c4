"""The map of raw vectors of two numbers: the vectors themselves, coloured by class, as the siamese papers draw them."""

from __future__ import annotations

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from torch import Tensor

from trainer.report.charts import LIGHT, Chart, chart
from trainer.report.insight import NAMED, Flat

SIZE = (4.6, 3.9)  # inches
DOTS = 2500
LONGEST = 20  # letters of a class in the legend


def scatter_charts(flat: Flat) -> list[Chart]:
    """Before training, where it is known, and after."""
    planes = [("before", flat.before), ("after", flat.after)]
    return [_chart(when, points, flat) for when, points in planes if points is not None]


def _chart(when: str, points: Tensor, flat: Flat) -> Chart:
    groups, inverse = torch.unique(flat.group, return_inverse=True)
    colours = [to_hex(colour) for colour in mpl.colormaps["tab10" if len(groups) <= 10 else "tab20"].colors]  # type: ignore[attr-defined]
    order = sorted(range(len(groups)), key=lambda number: flat.names.get(int(groups[number]), ""))  # as the legend has them
    every = -(-len(points) // DOTS)

    def draw(axes: Axes) -> None:
        for place, number in enumerate(order[:NAMED]):  # beyond that colours come again
            here = points[::every][inverse[::every] % NAMED == number]
            name = _plain(flat.names.get(int(groups[number])))
            axes.scatter(here[:, 0].tolist(), here[:, 1].tolist(), s=5, color=colours[place], linewidths=0, label=name)
        axes.set_aspect("equal", adjustable="datalim")
        axes.grid(color=LIGHT.faint, linewidth=0.8)
        if flat.names:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2, handletextpad=0.2)

    title = f"{when.capitalize()} training"
    return chart(f"map-{when}", title, draw, f"{len(points):,} raw vectors of two numbers by class", SIZE)


def _plain(name: str | None) -> str | None:
    """For a legend, which leaves out names that begin with _ and reads $ as mathematics."""
    if name is None:
        return None
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\u2026"
    return short.replace("$", r"\$").replace("_", "\u200b_", 1) if short.startswith("_") else short.replace("$", r"\$")
