"""What `nearfar inspect --against` and `--duplicates` tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.answers import print_result
from cluster.leakage import COSINE, LISTED, compare, draw
from cluster.progress import bar
from pipelines.duplicates import DISTANCE
from pipelines.manifest import Manifest
from pipelines.parallel import when_slow
from pipelines.tiles import require_png

SHOWN = 20


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to look for copies; None: the default."""

    model: str | None
    threshold: float | None
    distance: int | None
    sheet: Path | None
    workers: int


def run_inspect(shards: str, against: str | None, options: CopyOptions, *, as_json: bool) -> None:
    """Compare, print, and draw the sheet. Raises ValueError for bad input."""
    if options.threshold is not None and options.model is None:
        raise ValueError("--threshold is of the encoder's cosine: give --model MODEL with it")
    sheet = options.sheet
    if sheet is not None:
        require_png(sheet)
    manifest = Manifest.open(shards)
    other = None if against is None else Manifest.open(against)
    with bar("looking", "images") as report:
        found = compare(
            manifest,
            other,
            model=options.model,
            threshold=COSINE if options.threshold is None else options.threshold,
            distance=DISTANCE if options.distance is None else options.distance,
            map=when_slow(options.workers),
            progress=report,
        )
    counts, pairs = found.matches.counts(), found.pairs("image", "other")
    if sheet is not None and pairs:
        draw(found, sheet)
    result: dict[str, Any] = {
        "path": shards,
        "against": against,
        "images": len(found.images.uid),
        "unreadable": found.unreadable,
        "matched": sum(counts.values()),
        "counts": counts,
        "pairs": pairs,
        "checked": found.checked,
        "sheet": str(sheet) if sheet is not None and pairs else None,
    }
    print_result(result, as_json=as_json, text=_describe(result))


def _describe(result: dict[str, Any]) -> str:
    where = "are in another class of it, too" if result["against"] is None else f"are in {result['against']}, too"
    counts = ", ".join(f"{count} {kind}" for kind, count in result["counts"].items() if count)
    lines = [f"{pair['kind']:8} {pair['score']:.3f}  {pair['image']}  {pair['other']}" for pair in result["pairs"][:SHOWN]]
    if result["matched"] > SHOWN:
        lines.append(f"... and {result['matched'] - SHOWN} more (--json tells {LISTED})")
    unreadable = f"; {result['unreadable']} could not be read" if result["unreadable"] else ""
    total = f"{result['matched']} of {result['images']} images of {result['path']} {where}"
    lines.append(total + (f": {counts}" if counts else "") + unreadable)
    if result["sheet"] is not None:
        lines.append(f"sheet      {result['sheet']}")
    return "\n".join(lines)
