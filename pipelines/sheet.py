"""A contact sheet of a data set's records as training sees them: cropped, augmented and masked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from configs.schema import Data
from pipelines.augment import apply
from pipelines.batch import Batch
from pipelines.decode import Pixels
from pipelines.manifest import Manifest
from pipelines.records import member_names
from pipelines.stream import Loader, units_per_epoch
from pipelines.tar import printable

ROWS, COLUMNS = 12, 8
THUMB = 112  # pixels, or a multiple of the image size near to it
GAP, CAPTION, MARGIN = 10, 16, 190
INK, PALE, MASKED = "#20242b", "#6b7280", "#d9dce1"


@dataclass(frozen=True, slots=True)
class Row:
    """A class or a record, and the rows of the batch that belong to it, with what to write below each."""

    title: str
    note: str
    images: list[int]
    captions: list[str]


def draw_sheet(manifest: Manifest, file: Path, *, data: Data | None = None, seed: int = 0) -> int:
    """Write a PNG with the first batch of the training stream, one class or record a row; returns the number of rows.

    `data` as in a config, of which crops, augmentation and per_class count; by default whole images, not augmented.
    Raises ValueError when `file` is no .png or the data cannot make such batches.
    """
    if file.suffix.lower() != ".png":
        raise ValueError(f"--sheet writes a .png, got {str(file)!r}")
    data = _small(manifest, data or _plain(manifest))
    with Loader(manifest, data, seed=seed) as loader:
        batch = next(loader)
    pixels = (apply(batch.images, batch.draws, data.augment) * 255).round().to(torch.uint8)
    tiles = _tiles(batch, pixels.permute(0, 2, 3, 1).numpy())
    rows = list(_rows(manifest, batch, data.per_class))[:ROWS]
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        _paint(rows, tiles, data.image_size, batch.valid.tolist()).save(temporary, "PNG")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def _plain(manifest: Manifest) -> Data:
    longest = int(manifest.runs.length.max(initial=0)) if manifest.kind == "labelled" else 0
    return Data(train=manifest.location, image_size=THUMB, per_class=min(longest, COLUMNS) if longest > 1 else None)


def _small(manifest: Manifest, data: Data) -> Data:
    """The same data in batches that just fill a sheet."""
    rows = data.per_class or 1
    wanted = ROWS * COLUMNS if manifest.kind == "labelled" and data.per_class is None else ROWS
    there = units_per_epoch(manifest, data.model_copy(update={"batch": 2 * rows}))
    return data.model_copy(update={"batch": rows * min(wanted, there), "max_bad_fraction": 1.0})


def _rows(manifest: Manifest, batch: Batch, per_class: int | None) -> Iterator[Row]:
    samples = [(shard, row) for _, shard, row in batch.sample.tolist()]
    keys = [printable(manifest.keys(shard)[row]) for shard, row in samples]
    if manifest.kind == "labelled":
        # A unit of K rows, which may be one of several of its class; else all rows of a class.
        unit = (batch.record // per_class).tolist() if per_class else batch.group.tolist()
        of_row = [keys[record] for record in batch.record.tolist()]
        for number in dict.fromkeys(unit):
            images = [index for index, own in enumerate(unit) if own == number][:COLUMNS]
            group = int(batch.group[images[0]])
            count = manifest.class_counts.get(group, 1)  # two views of an image without its label are a group of their own
            note = f"{count} images" if count > 1 else "1 image"
            name = manifest.class_names.get(group, of_row[images[0]])
            yield Row(printable(name), note, images, [of_row[index] for index in images])
        return
    for number, (shard, row) in enumerate(samples):
        images = torch.nonzero(batch.record == number).flatten().tolist()
        about = [f"match {int(batch.match[number])}"] if batch.match is not None else []
        about += [f"weight {float(batch.weight[number]):g}"] if batch.weight is not None else []
        label = manifest.column(shard, "label")[row]
        about += [f"group {printable(label)}"] if label is not None else []
        about += [f"target [{batch.target.shape[1]}]"] if batch.target is not None else []
        yield Row(keys[number], ", ".join(about), images, member_names(manifest.kind, len(images)))


def _tiles(batch: Batch, pixels: Pixels) -> list[Pixels | int]:
    """For every row its pixels [S, S, 3], or the length of its vector.  pixels: [k, S, S, 3]"""
    if batch.place is None or batch.vectors is None:
        return list(pixels)
    dim = batch.vectors.shape[1]
    return [pixels[place] if place < len(pixels) else dim for place in batch.place.tolist()]


def _paint(rows: list[Row], tiles: list[Pixels | int], side: int, valid: list[bool]) -> Image.Image:
    thumb = side * max(1, round(THUMB / side)) if side < 2 * THUMB else 2 * THUMB
    step, rise = thumb + GAP, thumb + GAP + CAPTION
    columns = max(len(row.images) for row in rows)
    canvas = Image.new("RGB", (MARGIN + columns * step + GAP, GAP + len(rows) * rise), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, row in enumerate(rows):
        top = GAP + number * rise
        draw.text((GAP, top), _fit(draw, row.title, MARGIN - 2 * GAP), INK, font)
        draw.text((GAP, top + CAPTION), _fit(draw, row.note, MARGIN - 2 * GAP), PALE, font)
        for column, (index, caption) in enumerate(zip(row.images, row.captions, strict=True)):
            left = MARGIN + column * step
            image = _draw_tile(tiles[index], thumb)
            if not valid[index]:
                image.paste(MASKED, (0, 0, thumb, thumb))
                caption = "masked"
            canvas.paste(image, (left, top))
            draw.text((left, top + thumb + 1), _fit(draw, caption, thumb), PALE, font)
    return canvas


def _draw_tile(tile: Pixels | int, thumb: int) -> Image.Image:
    """An image, or an empty square that tells of a vector."""
    if isinstance(tile, int):
        image = Image.new("RGB", (thumb, thumb), "white")
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0, thumb - 1, thumb - 1), outline=PALE)
        draw.text((thumb / 2, thumb / 2), f"vector [{tile}]", PALE, ImageFont.load_default(12), anchor="mm")
        return image
    # Pixels are shown as they are where they are few, so that nothing looks smoother than it is.
    return Image.fromarray(tile).resize((thumb, thumb), 0 if thumb >= len(tile) else Image.Resampling.LANCZOS)


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """Shortened in the middle, because keys differ at their ends."""
    font = ImageFont.load_default(12)
    keep = len(text)
    while keep > 2 and draw.textlength(_shorten(text, keep), font) > width:
        keep -= 1
    return _shorten(text, keep)


def _shorten(text: str, keep: int) -> str:
    return text if keep >= len(text) else f"{text[: keep // 2]}\u2026{text[len(text) - (keep - keep // 2) :]}"
