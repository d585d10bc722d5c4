"""The figures of the page of names, drawn by the losses themselves: `python -m tests.loss_figures`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.objective import build_objective

FOLDER = Path(__file__).parents[1] / "trainer" / "losses" / "figures"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe & Ito: told apart by everybody
Config = dict[str, Any]
Curve = tuple[str, Sequence[float], Sequence[float]]
MARGIN, NEAR, ALIKE = 0.2, 0.6, 0.5  # of the triplets; d_ap; s_ap

PAIRS: dict[str, Config] = {
    "squared": {"power": 2},
    "squared, half": {"power": 2, "half": True},
    "linear": {"power": 1},
    "legacy, half": {"half": True, "legacy": True},
}
TRIPLETS: dict[str, Config] = {
    "euclidean": {"margin": MARGIN},
    "squared": {"margin": MARGIN, "distance": "squared_euclidean"},
    "squared, half": {"margin": MARGIN, "distance": "squared_euclidean", "half": True},
    "soft, euclidean": {"soft": True},
}
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0)


def value(loss: Config, vectors: list[list[float]], **ids: Tensor | None) -> float:
    """The loss of one record, whose view i is vector i; the last vector is of another group."""
    n = len(vectors)
    group = torch.tensor([0] * (n - 1) + [1]) if loss["name"] == "info_nce" else torch.zeros(n, dtype=torch.int64)
    x, row = torch.tensor(vectors, dtype=torch.float64), torch.arange(n)
    found, _ = build_objective(loss).double()(x, group, record=torch.zeros_like(row), view=row, **ids)
    return float(found)


def pair_curve(options: Config, *, similar: bool) -> Callable[[float], float]:
    loss = {"name": "contrastive", "margin": 1.0, "normalize": False, **options}
    return lambda d: value(loss, [[0.0], [d]], match=torch.tensor([int(similar)]))


def triplet_curve(options: Config) -> Callable[[float], float]:
    loss = {"name": "triplet", "eps": 0.0, "normalize": False, **options}
    return lambda d_an: value(loss, [[0.0], [NEAR], [-d_an]])


def info_nce_curve(temperature: float) -> Callable[[float], float]:
    loss = {"name": "info_nce", "temperature": temperature, "queries": "anchors"}
    return lambda s_an: value(loss, [[1.0, 0.0], *([s, math.sqrt(1 - s * s)] for s in (ALIKE, s_an))])


def curves(made: dict[str, Callable[[float], float]], first: float, last: float) -> list[Curve]:
    """Label, x and y of each, at 61 places."""
    places = [first + (last - first) * i / 60 for i in range(61)]
    return [(label, places, [curve(x) for x in places]) for label, curve in made.items()]


def draw(folder: Path) -> None:
    """Write the SVG files; the same bytes from the same matplotlib."""
    pairs = [curves({name: pair_curve(o, similar=y) for name, o in PAIRS.items()}, 0.0, 1.5) for y in (True, False)]
    _figure(folder / "pairs.svg", pairs, ["d of a positive pair", "d of a negative pair"], mark=None)
    triplets = curves({name: triplet_curve(o) for name, o in TRIPLETS.items()}, 0.0, 1.4)
    _figure(folder / "triplets.svg", [triplets], [f"d_an, where d_ap = {NEAR}"], mark=NEAR)
    softmax = curves({f"temperature {t}": info_nce_curve(t) for t in TEMPERATURES}, -1.0, 1.0)
    _figure(folder / "info_nce.svg", [softmax], [f"s_an, where s_ap = {ALIKE}"], mark=ALIKE)


def _figure(file: Path, panels: list[list[Curve]], labels: list[str], *, mark: float | None) -> None:
    import matplotlib

    matplotlib.use("svg")
    style = {
        "svg.hashsalt": "nearfar",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.4 * len(panels) + 0.4, 2.6), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for place, panel, label in zip(axes, panels, labels, strict=True):
            for colour, (name, x, y) in zip(COLOURS, panel, strict=False):
                place.plot(x, y, color=colour, label=name, linewidth=1.6, linestyle="--" if "half" in name else "-")
            if mark is not None:
                place.axvline(mark, color="#888888", linewidth=0.8, linestyle=":")
            place.set_xlabel(label)
            place.grid(color="#dddddd", linewidth=0.5)
        axes[0].set_ylabel("loss")
        axes[-1].legend(frameon=False, fontsize=8)
        figure.savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
