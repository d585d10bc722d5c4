"""The map of embeddings: every image a point, some of them pictures, with lines to the middle of their class."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from trainer.report.charts import LIGHT, PAGE, Chart, Colours
from trainer.report.contact import as_png, data_url, thumbnail
from trainer.report.insight import Map, Picture
from trainer.report.plane import Plane

SIDE, THUMB, PIXELS = 640, 46, 64  # of the map, of a picture on it, and of the picture's own
MARGIN = THUMB * 0.75
DOTS = 2500


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A plane in the units of the drawing."""

    height: float
    dots: list[tuple[float, float]]
    lines: list[tuple[float, float, float, float]]
    pictures: list[tuple[float, float, Picture]]


def map_charts(shown: Map) -> list[Chart]:
    """Before training, where it is known, and after."""
    planes = [("before", shown.before), ("after", shown.after)]
    return [_chart(name, plane, shown) for name, plane in planes if plane is not None]


def _chart(when: str, plane: Plane, shown: Map) -> Chart:
    drawn = _place(plane.points, shown)
    title = f"{when.capitalize()} training"
    about = f"Map of {len(plane.points):,} embeddings {when} training, {plane.method}"
    svg = _svg(drawn, LIGHT, about)
    inline = _svg(drawn, PAGE, about)
    return Chart(f"map-{when}", f"{title} ({plane.method})", inline, svg.encode(), _png(drawn))


def _place(points: Tensor, shown: Map) -> _Drawn:
    low, high = points.min(0).values, points.max(0).values
    aspect = float(((high - low)[1] / (high - low)[0].clamp(min=1e-6)).clamp(0.6, 1.0))
    room = torch.tensor([SIDE - 2 * MARGIN, SIDE * aspect - 2 * MARGIN])
    at = ((points - (low + high) / 2) / (high - low).clamp(min=1e-6) + 0.5) * room + MARGIN  # [N, 2]
    every = -(-len(at) // DOTS)
    lines: list[tuple[float, float, float, float]] = []
    pictures: list[tuple[float, float, Picture]] = []
    for rows in shown.groups:
        x, y = at[list(rows)].mean(0).tolist()
        lines += [(x, y, *at[row].tolist()) for row in rows if len(rows) > 1]
        pictures += [(*at[row].tolist(), shown.pictures[row]) for row in rows]
    return _Drawn(SIDE * aspect, [tuple(p) for p in at[::every].tolist()], lines, pictures)


def _svg(drawn: _Drawn, colours: Colours, about: str) -> str:
    half = THUMB / 2
    dots = "".join(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="1.8"/>' for x, y in drawn.dots)
    lines = "".join(f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" for a, b, c, d in drawn.lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {drawn.height:.0f}" '
        f'role="img" aria-label="{escape(about)}">',
        f'<g fill="{colours.ink}" fill-opacity=".35">{dots}</g>',
        f'<path d="{lines}" stroke="{colours.first}" stroke-opacity=".7" stroke-width="1.2" fill="none"/>',
    ]
    for x, y, picture in drawn.pictures:
        assert picture.image is not None
        box = f'x="{x - half:.1f}" y="{y - half:.1f}" width="{THUMB}" height="{THUMB}"'
        parts.append(
            f'<g class="shown"><title>{escape(picture.label)}</title><rect {box} rx="5" fill="#fff" stroke="{colours.faint}"/>'
            f'<image x="{x - half + 3:.1f}" y="{y - half + 3:.1f}" width="{THUMB - 6}" height="{THUMB - 6}" '
            f'href="{data_url(picture.image, PIXELS)}"/></g>'
        )
    return "".join([*parts, "</svg>"])


def _png(drawn: _Drawn, scale: int = 2) -> bytes:
    canvas = Image.new("RGB", (SIDE * scale, round(drawn.height) * scale), "white")
    draw = ImageDraw.Draw(canvas)
    for x, y in drawn.dots:
        draw.ellipse([(v - 1.5) * scale for v in (x, y)] + [(v + 1.5) * scale for v in (x, y)], fill="#b4b9c2")
    for line in drawn.lines:
        draw.line([v * scale for v in line], fill=LIGHT.first, width=scale)
    side = (THUMB - 6) * scale
    for x, y, picture in drawn.pictures:
        assert picture.image is not None
        left, top = round(x * scale - side / 2), round(y * scale - side / 2)
        draw.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), fill="white", outline=LIGHT.faint)
        canvas.paste(thumbnail(picture.image, side), (left, top))
    return as_png(canvas)
