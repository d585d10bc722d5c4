"""The work of `nearfar pack`: where it runs, and what it tells."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.progress import bar, say
from pipelines.pack import REJECTED, PackSummary, pack
from pipelines.work import partial_folder

SHOWN = 20  # images left out that are named
LOCAL_WORKERS = 2


class Interrupted(Exception):
    """Ctrl-C; the message says how to go on."""


def run_pack(source: str, out: Path, *, ray: bool, address: str | None, workers: int | None, **options: Any) -> PackSummary:
    """`pack` with a progress bar, on Ray or in processes; `workers` None: as many as the cluster has CPUs, or LOCAL_WORKERS."""
    try:
        with bar("packing", "images") as report:
            if not ray and address is None:
                return pack(source, out, workers=workers or LOCAL_WORKERS, progress=report, **options)
            from cluster.tasks import ray_map

            with ray_map(address, workers) as (run, cpus):
                return pack(source, out, workers=cpus, map=run, progress=report, **options)
    except KeyboardInterrupt:
        kept = partial_folder(out)
        hint = f"; what is done is kept in {kept}, the same command goes on there" if kept.exists() else ""
        raise Interrupted(f"interrupted{hint}") from None


def describe(summary: PackSummary) -> str:
    """What a person wants to know."""
    lines = [
        f"{part.path}: {part.records} records, {part.images} images, {part.classes} classes, {part.shards} shards, "
        f"{part.nbytes / 2**20:.1f} MB"
        for part in summary.sets.values()
    ]
    reasons = "".join(f"; {count} {reason}" for reason, count in summary.left_out.items())
    again = f", {summary.resumed_chunks} chunks were there already" if summary.resumed_chunks else ""
    return "\n".join(
        [*lines, f"{len(summary.rejected)} images left out{reasons}", f"{summary.images_per_s:.0f} images/s{again}"]
    )


def as_dict(summary: PackSummary) -> dict[str, Any]:
    """For --json."""
    return {
        "sets": {name: {**asdict(part), "path": str(part.path)} for name, part in summary.sets.items()},
        "rejected": summary.rejected,
        "left_out": summary.left_out,
        "ignored": summary.ignored,
        "images_per_s": round(summary.images_per_s, 1),
        "resumed_chunks": summary.resumed_chunks,
    }


def tell_left_out(summary: PackSummary, out: Path) -> None:
    """Names on stderr; the whole list is in a file."""
    for image, reason in summary.rejected[:SHOWN]:
        say(f"left out: {image}: {reason}")
    if len(summary.rejected) > SHOWN:
        say(f"... and {len(summary.rejected) - SHOWN} more in {out / REJECTED}")
    if summary.empty_classes:
        say(f"empty class folders: {', '.join(summary.empty_classes[:10])}")
