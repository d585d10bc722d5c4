"""A sheet of images in rows, with what is known of each below it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipelines.decode import decode

SIDE, GAP, LINE = 112, 10, 15  # pixels
INK, PALE, MISSING = "#20242b", "#6b7280", "#d9dce1"


@dataclass(frozen=True, slots=True)
class Tile:
    """An image file, or None where there is none to show, and one or two lines below it."""

    image: bytes | None
    title: str
    note: str = ""


def draw_tiles(rows: Sequence[Sequence[Tile]], file: Path) -> None:
    """Write a PNG; what cannot be decoded is an empty square. Raises ValueError when `file` is no .png."""
    require_png(file)
    step, rise = SIDE + GAP, SIDE + GAP + 2 * LINE
    canvas = Image.new("RGB", (GAP + max(map(len, rows), default=1) * step, GAP + max(1, len(rows)) * rise), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            left, top = GAP + column * step, GAP + number * rise
            canvas.paste(_square(tile.image), (left, top))
            draw.text((left, top + SIDE + 1), shorten(tile.title, 17), INK, font)
            draw.text((left, top + SIDE + 1 + LINE), shorten(tile.note, 17), PALE, font)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        canvas.save(temporary, "PNG", optimize=True)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def require_png(file: Path) -> None:
    """Raise ValueError unless a sheet can be written there."""
    if file.suffix.lower() != ".png":
        raise ValueError(f"--sheet writes a .png, got {str(file)!r}")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"--sheet {str(file)!r}: there is no folder {str(file.absolute().parent)!r}")


def shorten(text: str, most: int) -> str:
    """Without its middle, because names differ at their ends."""
    return text if len(text) <= most else f"{text[: most // 2]}\u2026{text[len(text) - (most - most // 2 - 1) :]}"


def _square(data: bytes | None) -> Image.Image:
    square = Image.new("RGB", (SIDE, SIDE), "white")
    try:
        image = Image.fromarray(decode(data)) if data is not None else None
    except ValueError:
        image = None
    if image is None:
        square.paste(MISSING, (0, 0, SIDE, SIDE))
        return square
    scale = SIDE / max(image.size)
    width, height = (max(1, round(extent * scale)) for extent in image.size)
    # Pixels are shown as they are where they are few, so that nothing looks smoother than it is.
    shown = image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    square.paste(shown, ((SIDE - width) // 2, (SIDE - height) // 2))
    return square
