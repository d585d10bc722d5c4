"""`nearfar inspect --mining`: one training batch as the run's encoders saw it, and what the loss mines from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.building import augmented, objective_for
from cluster.mining_sheet import draw_picked
from cluster.progress import bar
from cluster.runfolder import RunFolder
from cluster.towers import check_members, with_input_dim
from cluster.warm import weights_of
from configs.load import load_config
from configs.schema import RunConfig
from pipelines.batch import Batch
from pipelines.mixture import open_sources
from pipelines.stream import Loader
from pipelines.tiles import require_png
from trainer import checkpoints, state
from trainer.backward import encode, pieces_of
from trainer.encoders import build_encoder
from trainer.report.data import mining_series, read_series
from trainer.warm import begin_from
from trainer.watching import Rules, Seen, Watcher

IMAGES = 256  # encoded at once
MOST_ROWS = 12  # of what training has logged
SHARES = {"hard": "hard_fraction", "semi_hard": "semi_hard_fraction", "easy": "easy_fraction"}


def inspect_mining(config: Path, shards: str | None = None, sheet: Path | None = None) -> dict[str, Any]:
    """What --json prints: `encoders`, a row for each; `logged`, rows of training itself; `rules`, what was asked for.

    `config`: a YAML file or a run's folder. The batch is the first of `data.train`, or of `shards`, augmented as in training;
    the encoders are in eval mode: the untrained (or warm-started) one, then those of the run's checkpoints. `sheet` draws
    what was picked with the last. Raises ValueError for bad input.
    """
    if sheet is not None:
        require_png(sheet)
    overrides = [] if shards is None else [f"data.train={json.dumps(shards)}"]
    settings = load_config(config / "config.yaml" if config.is_dir() else config, overrides)
    manifest = open_sources(settings.data.train, settings.data.cache)
    settings = with_input_dim(settings, manifest)
    check_members(settings, manifest, build_encoder(settings.encoder, settings.data.image_size))
    folder = RunFolder(config.absolute()) if config.is_dir() else RunFolder.of(settings)
    other = _other(settings, folder) if not config.is_dir() else None
    with Loader(manifest, settings.data, seed=settings.seed) as stream:
        batch = next(stream)
    images = augmented(settings, torch.float32)(batch)
    rows, seen, watcher = [], None, None
    with bar("embedding", "encoders") as report:
        for number, (step, encoder) in enumerate(_encoders(settings, None if other else folder), 1):
            if watcher is None:
                watcher = Watcher(objective_for(settings, manifest, encoder))
            seen = watcher(_embed(encoder, images, batch), batch)
            rows.append({"step": step, **_row(seen)})
            report(number)
    assert watcher is not None
    assert seen is not None
    if sheet is not None:
        draw_picked(images, batch, seen.picked, watcher.rules.margin, sheet)
    return {
        "data": [source.path for source in settings.data.train],
        "run": str(folder.path) if folder.exists() and other is None else None,
        "images": batch.num_rows,
        "rules": asdict(watcher.rules),
        "note": _note(watcher.rules) + (f"; {other}" if other else ""),
        "encoders": rows,
        "logged": [] if other else _logged(folder),
        "sheet": None if sheet is None else str(sheet),
    }


def describe(found: dict[str, Any]) -> str:
    """The tables for a person."""
    lines = [f"batch      the first of {', '.join(found['data'])}: {found['images']} images", f"mined      {found['note']}", ""]
    head = ("step", "hard", "semi-hard", "easy", "picked hard", "picked semi-hard", "picked easy", "mean d_ap", "mean d_an")
    lines.append("  ".join(head))
    for row in found["encoders"]:
        cells = [str(row["step"])]
        cells += [f"{row[part + name]:.1%}" for part in ("", "picked_") for name in SHARES]
        cells += [f"{row['mean_d_ap']:.4f}", f"{row['mean_d_an']:.4f}"]
        lines.append("  ".join(cell.rjust(len(name)) for cell, name in zip(cells, head, strict=True)))
    if found["logged"]:
        lines += ["", "while training, over all ranks", "    step    hard  semi-hard    easy"]
        lines += [f"{row['step']:8}{row['hard']:8.1%}{row['semi_hard']:11.1%}{row['easy']:8.1%}" for row in found["logged"]]
    return "\n".join([*lines, *([] if found["sheet"] is None else [f"sheet      {found['sheet']}"])])


def _other(config: RunConfig, folder: RunFolder) -> str | None:
    """What to say when the folder holds a run of other settings than these, so that its encoders are not what is asked for."""
    if not folder.exists() or folder.config().identity() == config.identity():
        return None
    return f"the run in {folder.path} has other settings, so it is left out: name that folder to look at it"


def _encoders(config: RunConfig, folder: RunFolder | None) -> Iterator[tuple[int, nn.Module]]:
    """(step, encoder) from the untrained one on, as far as there are checkpoints that are whole; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_encoder(config.encoder, config.data.image_size)
    if config.encoder.warm:
        begin_from(encoder, config.encoder, weights_of(config))
    yield 0, encoder.eval()
    if folder is None or not folder.exists():
        return
    store = folder.checkpoints(config)
    for name in sorted(store.names()):
        try:
            saved = checkpoints.read(store, name)
        except checkpoints.Damaged:
            continue
        state.load_module(saved, "encoder", encoder)
        yield saved.step, encoder.eval()


@torch.no_grad()
def _embed(encoder: nn.Module, images: Tensor, batch: Batch) -> Tensor:
    """Vectors of the images, and those of the batch's vectors if a tower takes them."""
    return encode(encoder, images, pieces_of(batch, IMAGES), None, batch)


def _row(seen: Seen) -> dict[str, Any]:
    own = {name: seen.batch[key] for name, key in SHARES.items()}
    picked = {f"picked_{name}": seen.picked_shares[key] for name, key in SHARES.items()}
    return {**own, **picked, "picked": len(seen.picked.anchor), "mean_d_ap": seen.mean_d_ap, "mean_d_an": seen.mean_d_an}


def _note(rules: Rules) -> str:
    how = f"margin {rules.margin:g}, {rules.distance} distance"
    if rules.miner == "given":
        return f"{rules.loss}: the triplets of the records, {how}"
    if rules.miner:
        return f"{rules.loss} with miner {rules.miner}, {how}"
    return f"{rules.loss} picks no single negative: the closest one of each pair stands for its picks, {how}"


def _logged(folder: RunFolder) -> list[dict[str, Any]]:
    curves = mining_series(read_series(folder.metrics)) if folder.exists() else {}
    rows = [
        {"step": hard[0], "hard": hard[1], "semi_hard": semi_hard[1], "easy": easy[1]}
        for hard, semi_hard, easy in zip(*curves.values(), strict=True)
    ]
    if len(rows) <= MOST_ROWS:
        return rows
    return [rows[round(place * (len(rows) - 1) / (MOST_ROWS - 1))] for place in range(MOST_ROWS)]
