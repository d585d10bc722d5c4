"""The report of a run, from what lies in its folder: finished, stopped, or still training."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster import attempts
from cluster.building import EVALUATION_BATCH
from cluster.gallery import Gallery
from cluster.models import build_trained
from cluster.progress import say
from cluster.runfolder import RunFolder, read_lines
from cluster.store import redact, tracking_uri, ui_command
from configs.load import dump_config
from configs.schema import RunConfig
from pipelines.mixture import open_sources, parts_of
from trainer import checkpoints
from trainer.encoders import build_encoder
from trainer.export import SETTINGS
from trainer.report.data import Evaluation, Health, ReportData, Start
from trainer.report.insight import Insight, look
from trainer.report.page import write_report
from trainer.warm import begin_from

UNREADABLE = (ValueError, RuntimeError, OSError)  # of data or weights that are no longer where they were


def rewrite_report(run: Path) -> Path:
    """The report of a run as far as it has come. Raises ValueError when there is none."""
    folder = RunFolder.existing(run)
    config = folder.config()
    notes: list[str] = []
    gallery = _gallery(config, folder, notes)
    try:
        return report(config, folder, folder.result() or {}, gallery, notes)
    finally:
        if gallery is not None:
            gallery.close()


def report(
    config: RunConfig, folder: RunFolder, result: Mapping[str, Any], gallery: Gallery | None, notes: list[str] | None = None
) -> Path:
    """Write it. result: what result.json holds or will hold; gallery: as the trained encoder sees the evaluation set."""
    say("writing the report")
    notes = [] if notes is None else notes
    curve = [{k[4:]: v for k, v in row.items() if k.startswith("val/")} for row in read_lines(folder.metrics)]
    evaluations = [row for row in curve if row]
    steps = [int(row["step"]) for row in read_lines(folder.metrics)]
    finished = result.get("status") == "FINISHED"
    data = ReportData(
        name=config.name,
        after=result["metrics"] if finished else evaluations[-1] if evaluations else {},
        before=result["before"] if finished else evaluations[0] if evaluations else {},
        headline=config.tracking.promote.metric,
        best=_best(folder, config.tracking.promote.metric),
        status=result.get("status", ""),
        steps=result["steps"] if finished else max(steps, default=0),
        of_steps=config.train.steps or 0,
        stopped_early=bool(result.get("stopped_early")),
        wall_s=result.get("wall_s", 0.0),
        num_workers=config.cluster.most_workers,
        evaluation=None if gallery is None else _evaluation(config, gallery, notes),
        insight=None if gallery is None else _insight(config, folder, gallery, notes),
        notes=notes,
        health=_health(folder, gallery, finished=finished),
        leakage=_leakage(folder, notes),
        config_yaml=dump_config(config),
        load=_how_to_load(config, folder, result),
        ui_command=ui_command(tracking_uri(config.tracking, folder.path.parent)) if config.tracking.enabled else "",
    )
    return write_report(folder.path, data)


def untrained_encoder(config: RunConfig, folder: RunFolder) -> nn.Module:
    """The encoder with which the run began, in float32 on the CPU: it follows from the seed and from what it started from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_encoder(config.encoder, config.data.image_size)
    if config.encoder.warm:
        begin_from(encoder, config.encoder, load_file(folder.init))
    return encoder.eval()


def _gallery(config: RunConfig, folder: RunFolder, notes: list[str]) -> Gallery | None:
    """Of the newest checkpoint; None, with a note, where there is none or the images are not to be had."""
    if config.data.eval is None:
        return None
    try:
        store = folder.checkpoints(config)
        saved = checkpoints.newest(store)
        if saved is None:
            notes.append("There is no checkpoint yet, so there are curves, but no pictures.")
            return None
        if folder.result() is None or folder.result()["status"] != "FINISHED":  # type: ignore[index]
            notes.append(f"The pictures are of the newest checkpoint, of step {saved.step:,}.")
        return Gallery(config, build_trained(config, saved))
    except UNREADABLE as error:
        notes.append(f"There are no pictures: {error}.")
        return None


def _insight(config: RunConfig, folder: RunFolder, gallery: Gallery, notes: list[str]) -> Insight | None:
    before: Tensor | None = None
    try:
        before = gallery.embed(untrained_encoder(config, folder)).vectors
    except UNREADABLE as error:
        notes.append(f"What the encoder saw before training is not shown: {error}.")
    if config.evaluate.queries != "all":
        notes.append(
            f"The numbers are of {config.evaluate.queries} as queries; pictures and mistakes search all among each other."
        )
    return look(gallery, gallery.found.vectors, before, raw=gallery.found.raw)


def _evaluation(config: RunConfig, gallery: Gallery, notes: list[str]) -> Evaluation:
    manifest, unseen = gallery.manifest, False
    try:
        training = open_sources(config.data.train, config.data.cache)
        seen = {group for part in parts_of(training) for group in part.class_names}  # whatever namespace
        unseen = manifest.kind == "labelled" and seen.isdisjoint(manifest.class_names)
    except UNREADABLE as error:
        notes.append(f"The training data cannot be opened: {error}.")
    sampled = ""
    if gallery.stride > 1:
        sampled = f"one in {gallery.stride} of the stretches of {EVALUATION_BATCH} records"
    return Evaluation(
        num_classes=manifest.num_classes,
        num_images=manifest.num_images,
        num_seen=int(gallery.shown.sum()),
        kind=manifest.kind,
        classes_unseen=unseen,
        sampled=sampled,
    )


def _best(folder: RunFolder, metric: str) -> tuple[int, float] | None:
    found = [(row["step"], row[f"val/{metric}"]) for row in read_lines(folder.metrics) if f"val/{metric}" in row]
    return max(found, key=lambda point: point[1]) if found else None


def _health(folder: RunFolder, gallery: Gallery | None, *, finished: bool) -> Health:
    starts = [
        Start(
            at=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"])),
            workers=row["world"],
            from_step=row["from_step"],
            ended=row.get("last_ended") or "",
            skipped=row.get("skipped") or (),
        )
        for row in read_lines(folder.attempts)
    ]
    ended = "" if finished else attempts.word(folder.path) or ""
    unread = gallery.unread if gallery else ()
    return Health(bad=list(read_lines(folder.quarantine)), unread=unread, starts=starts, ended=ended)


def _leakage(folder: RunFolder, notes: list[str]) -> dict[str, Any] | None:
    file = folder.path / "leakage.json"
    try:
        found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        return found
    except ValueError as error:
        notes.append(f"leakage.json cannot be read: {error}.")
        return None


def _how_to_load(config: RunConfig, folder: RunFolder, result: Mapping[str, Any]) -> str:
    """Three lines of Python, or nothing while there is no model."""
    length = f"[2, dim], {_length(folder)}"
    if result.get("model"):
        return (
            "import mlflow\n"
            f'mlflow.set_tracking_uri("{redact(tracking_uri(config.tracking, folder.path.parent))}")\n'
            f'vectors = mlflow.pyfunc.load_model("{result["model"]}").predict(["a.jpg", "b.png"])  # {length}'
        )
    if (folder.export / "MLmodel").exists():
        return (
            "import mlflow\n"
            f'model = mlflow.pyfunc.load_model("{folder.export}")\n'
            f'vectors = model.predict(["a.jpg", "b.png"])  # {length}'
        )
    if (folder.export / "model.py").exists():
        return (
            f'import sys; sys.path.insert(0, "{folder.export}")\n'
            "from model import Encoder\n"
            f'vectors = Encoder("{folder.export}")(["a.jpg", "b.png"])  # {length}'
        )
    return ""


def _length(folder: RunFolder) -> str:
    file = folder.export / SETTINGS
    settings = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return "raw: compare them by euclidean distance" if settings.get("distance") == "euclidean" else "unit length"
