"""A sheet of the triplets that a loss has picked from a batch: anchor, positive, negative, framed by how hard they are."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.batch import Batch
from trainer.watching import Picked

TRIPLETS, COLUMNS = 12, 2
SIDE, GAP, LINE, FRAME = 112, 10, 16, 4  # pixels
INK, PALE, MISSING = "#20242b", "#6b7280", "#d9dce1"
COLOURS = ("#c62828", "#e0a100", "#2e8b57")
WORDS = ("hard", "semi-hard", "easy")


def spread(picked: Picked, most: int = TRIPLETS) -> list[int]:
    """Numbers of triplets of different anchors, spread over the batch; less than `most` where there are fewer anchors."""
    anchors = torch.unique(picked.anchor)
    places = torch.linspace(0, len(anchors) - 1, min(most, len(anchors))).round().long()
    return [int((picked.anchor == anchor).nonzero()[0, 0]) for anchor in anchors[places]]


def draw_picked(images: Tensor, batch: Batch, picked: Picked, margin: float, file: Path) -> None:
    """Write a PNG with some anchors, each with its positive and negative. images: [k, 3, S, S] in [0, 1], the batch's"""
    chosen, kinds = spread(picked), picked.kinds(margin)
    step, rise = SIDE + GAP, SIDE + GAP + 2 * LINE
    width = COLUMNS * (3 * step + 2 * GAP)
    canvas = Image.new("RGB", (width, LINE + GAP + max(1, -(-len(chosen) // COLUMNS)) * rise), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, (word, colour) in enumerate(zip(WORDS, COLOURS, strict=True)):
        draw.text((GAP + number * step, GAP / 2), word, colour, font)
    for number, triplet in enumerate(chosen):
        left = GAP + (number % COLUMNS) * (3 * step + 2 * GAP)
        top = LINE + GAP + (number // COLUMNS) * rise
        kind = int(kinds[triplet])
        d_ap, d_an = float(picked.d_ap[triplet]), float(picked.d_an[triplet])
        lines = (("anchor", WORDS[kind]), ("positive", f"d_ap {d_ap:.3f}"), ("negative", f"d_an {d_an:.3f}"))
        rows = (picked.anchor, picked.positive, picked.negative)
        for column, (row, (title, note)) in enumerate(zip(rows, lines, strict=True)):
            at = (left + column * step, top)
            canvas.paste(_tile(images, batch, int(row[triplet])), at)
            if title == "negative":
                draw.rectangle((at[0], top, at[0] + SIDE - 1, top + SIDE - 1), outline=COLOURS[kind], width=FRAME)
            draw.text((at[0], top + SIDE + 1), title, INK, font)
            draw.text((at[0], top + SIDE + 1 + LINE), note, COLOURS[kind] if title == "anchor" else PALE, font)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        canvas.save(temporary, "PNG")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _tile(images: Tensor, batch: Batch, row: int) -> Image.Image:
    """The image of a row of the batch as training sees it; a grey square for a vector."""
    place = row if batch.place is None else int(batch.place[row])
    if place >= len(images):
        return Image.new("RGB", (SIDE, SIDE), MISSING)
    pixels = (images[place].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    smooth = Image.Resampling.NEAREST if len(pixels) < SIDE else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((SIDE, SIDE), smooth)
