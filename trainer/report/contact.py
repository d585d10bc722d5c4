"""The contact sheet: queries, their nearest neighbours, right ones in green and wrong ones in red."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from trainer.portable_model import to_rgb
from trainer.report.data import Sheet

THUMB = 96  # pixels
GAP, FRAME, CAPTION = 14, 5, 18
RIGHT, WRONG, INK = "#1a9e55", "#d63b3b", "#555b66"


def thumbnail(data: bytes, side: int = THUMB) -> Image.Image:
    """An encoded image, whole, on a white square."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = to_rgb(image)
    scale = side / max(rgb.size)
    rgb = rgb.resize((max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return square


def data_url(data: bytes) -> str:
    """A thumbnail that travels inside the page."""
    buffer = io.BytesIO()
    thumbnail(data).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def montage(sheets: Sequence[Sheet]) -> bytes:
    """The sheets as one PNG: a row each, the query first."""
    columns = 1 + max(len(sheet.neighbours) for sheet in sheets)
    step, rise = THUMB + GAP, THUMB + GAP + CAPTION
    canvas = Image.new("RGB", (GAP + columns * step + GAP, GAP + len(sheets) * rise), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(12)
    for row, sheet in enumerate(sheets):
        top = GAP + row * rise
        canvas.paste(thumbnail(sheet.image), (GAP, top))
        draw.text((GAP, top + THUMB + 4), _short(sheet.label), INK, font)
        for column, hit in enumerate(sheet.neighbours, 1):
            left = GAP + column * step + GAP
            box = (left - FRAME + 1, top - FRAME + 1, left + THUMB + FRAME - 2, top + THUMB + FRAME - 2)
            draw.rectangle(box, fill=RIGHT if hit.right else WRONG)
            canvas.paste(thumbnail(hit.image), (left, top))
            draw.text((left, top + THUMB + 6), f"{hit.cosine:.2f} {_short(hit.label)}", INK, font)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _short(label: str) -> str:
    return label if len(label) <= 13 else f"{label[:12]}\u2026"
