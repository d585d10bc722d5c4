"""Thumbnails, and contact sheets of them: right ones framed green, wrong ones red."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from trainer.portable_model import DAMAGED, to_rgb
from trainer.report.insight import Confused, Picture, Sheet

THUMB = 96  # pixels
HEAVY = 64 * 2**10  # bytes
GAP, FRAME, CAPTION = 14, 5, 18
RIGHT, WRONG, INK, TEXT = "#1a9e55", "#d63b3b", "#555b66", "#e8eaee"


@dataclass(frozen=True, slots=True)
class Tile:
    """A picture, what is written below it, and whether it is right, wrong or neither."""

    picture: Picture
    caption: str
    right: bool | None = None


def thumbnail(data: bytes, side: int = THUMB) -> Image.Image:
    """An encoded image, whole, on a white square; a grey one where Pillow cannot read it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded small
            rgb = to_rgb(ImageOps.exif_transpose(image))
    except DAMAGED:
        return Image.new("RGB", (side, side), TEXT)
    scale = side / max(rgb.size)
    rgb = rgb.resize((max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return square


def lighter(data: bytes) -> bytes:
    """The image itself, or a smaller one where it is heavy: a report holds hundreds."""
    return data if len(data) <= HEAVY else as_png(thumbnail(data, 2 * THUMB))


@lru_cache(maxsize=4096)
def data_url(data: bytes, side: int = THUMB) -> str:
    """A thumbnail that travels inside the page."""
    buffer = io.BytesIO()
    thumbnail(data, side).save(buffer, "WEBP", quality=80, method=2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def of_sheets(sheets: Sequence[Sheet]) -> list[list[Tile]]:
    """A row each, the query first."""
    return [
        [
            Tile(sheet.query, sheet.query.label),
            *(Tile(hit.picture, f"{hit.cosine:.2f} {hit.picture.label}", hit.right) for hit in sheet.neighbours),
        ]
        for sheet in sheets
    ]


def of_clusters(clusters: Sequence[Confused]) -> list[list[Tile]]:
    """A row each, its members."""
    return [[Tile(picture, picture.label) for picture in cluster.members] for cluster in clusters]


def montage(rows: Sequence[Sequence[Tile]]) -> bytes:
    """Rows of tiles as one PNG."""
    step, rise = THUMB + GAP, THUMB + GAP + CAPTION
    canvas = Image.new("RGB", (GAP + max(map(len, rows)) * step, GAP + len(rows) * rise), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, row in enumerate(rows):
        top = GAP + number * rise
        for column, tile in enumerate(row):
            left = GAP + column * step
            if tile.right is not None:
                box = (left - FRAME + 1, top - FRAME + 1, left + THUMB + FRAME - 2, top + THUMB + FRAME - 2)
                draw.rectangle(box, fill=RIGHT if tile.right else WRONG)
            if tile.picture.image is None:
                draw.rectangle((left, top, left + THUMB - 1, top + THUMB - 1), fill=TEXT)
            else:
                canvas.paste(thumbnail(tile.picture.image), (left, top))
            draw.text((left, top + THUMB + 6), _short(tile.caption), INK, font)
    return as_png(canvas)


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _short(label: str) -> str:
    return label if len(label) <= 15 else f"{label[:14]}\u2026"
