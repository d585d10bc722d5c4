"""What a finished run leaves behind: the exported encoder, its registration, the report and result.json."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from cluster.check import Facts
from cluster.exporting import POSITIVE, Trained, export_trained
from cluster.gallery import Gallery
from cluster.models import build_trained
from cluster.progress import say
from cluster.promotion import Registered
from cluster.proof import Proof, prove
from cluster.registration import LOGGED_AS, Gate, register
from cluster.reporting import report
from cluster.runfolder import RunFolder, read_lines
from cluster.store import redact, tracking_uri
from cluster.tracking import Tracker
from configs.schema import RunConfig
from trainer import checkpoints
from trainer.encoders.towers import Towers, takes_vectors


def conclude(config: RunConfig, folder: RunFolder, facts: Facts, tracker: Tracker | None, *, started: float) -> dict[str, Any]:
    """Export the trained encoder, prove that it is the same, register it, write the report and the result.

    Raises RuntimeError when the export differs or the registry cannot be reached; what was trained stays.
    """
    say("exporting the encoder")
    encoder = trained_encoder(config, folder)
    before, after = _metrics(folder)
    gallery = Gallery(config, encoder) if config.data.eval is not None and config.finish.report else None
    steps = _last_step(folder)
    seen = None if gallery is None or gallery.manifest.vector_dim else (gallery.found.vectors, gallery.found.group)
    done = Trained(encoder, steps, after)
    _, proof = export_trained(config, folder, done, folder.export, seen=seen, onnx=config.finish.onnx)
    registered = None
    if config.tracking.register_as is not None and tracker is not None:
        registered = _register(config, folder, tracker, proof)
        if isinstance(encoder, Towers) and not takes_vectors(encoder.positive):
            _register(config, folder, tracker, prove(config, encoder.positive), tower=POSITIVE)
    result = {
        "status": "FINISHED",
        "name": config.name,
        "run": str(folder.path),
        "steps": steps,
        "stopped_early": steps < facts.steps,
        "before": before,
        "metrics": after,
        "weights": _weights(folder),
        "wall_s": time.time() - started,
        "mlflow_run_id": None if tracker is None else tracker.run_id,
        "model": None if registered is None else registered.uri,
        "model_version": None if registered is None else registered.version,
        "promoted": None if registered is None else registered.promoted,
        "tracking_uri": redact(tracking_uri(config.tracking, folder.path.parent)),
    }
    result["report"] = str(report(config, folder, result, gallery)) if config.finish.report else None
    if gallery is not None:
        gallery.close()
    folder.write_result(result)
    if tracker is not None:
        tracker.finish("FINISHED")
    return result


def describe(result: dict[str, Any]) -> str:
    """A result for a person."""
    early = ", stopped early" if result.get("stopped_early") else ""
    lines = [f"run         {result['run']} ({result['steps']} steps{early}, {result['wall_s']:.0f} s)"]
    for name in ("recall_at_1", "map_at_r"):
        if name in result["metrics"]:
            start = f"{result['before'][name]:.3f} -> " if name in result["before"] else ""
            lines.append(f"{name:12}{start}{result['metrics'][name]:.3f}")
    if result["model"] is not None:
        kept = "" if result["promoted"] else "  (an earlier version is at least as good and keeps the alias)"
        lines.append(f"model       {result['model']}{kept}")
    if result.get("weights") is not None:
        lines.append(f"weights     {result['weights']}")
    if result["report"] is not None:
        lines.append(f"report      {result['report']}")
    return "\n".join(lines)


def trained_encoder(config: RunConfig, folder: RunFolder) -> nn.Module:
    """The (averaged) encoder of the newest checkpoint, in float32 on the CPU, in eval mode."""
    store = folder.checkpoints(config)
    saved = checkpoints.newest(store)
    if saved is None:
        raise RuntimeError(f"{store.location} holds no complete checkpoint; train again with --resume")
    return build_trained(config, saved)


def _weights(folder: RunFolder) -> str | None:
    """The hash of the final weights of a reproducible run."""
    rows = list(read_lines(folder.hashes))
    return rows[-1]["weights"] if rows else None


def _metrics(folder: RunFolder) -> tuple[dict[str, float], dict[str, float]]:
    """Validation metrics of the first and of the last evaluation, without their prefix."""
    rows = [{k[4:]: v for k, v in row.items() if k.startswith("val/")} for row in read_lines(folder.metrics)]
    rows = [row for row in rows if row]
    return (rows[0], rows[-1]) if rows else ({}, {})


def _last_step(folder: RunFolder) -> int:
    """The step at which the training ended."""
    return max(int(row["step"]) for row in read_lines(folder.metrics))


def _register(config: RunConfig, folder: RunFolder, tracker: Tracker, proof: Proof, *, tower: str | None = None) -> Registered:
    """Log, load back, compare, register, and only then move the alias; `tower`: as a model of its own."""
    say("registering the model")
    assert config.tracking.register_as is not None
    run_id = tracker.wait(timeout_s=60)
    if run_id is None:
        raise RuntimeError(f"MLflow at {tracker.uri} does not answer, so the model is not registered")
    return register(
        run_id,
        folder.export if tower is None else folder.export / tower,
        logged_as=LOGGED_AS if tower is None else f"{LOGGED_AS}-{tower}",
        uri=tracker.uri,
        name=config.tracking.register_as if tower is None else f"{config.tracking.register_as}-{tower}",
        gate=Gate(config.tracking.promote.metric, config.tracking.promote.alias),
        example=proof.images[0],
        verify=lambda loaded: proof.check(loaded.predict),
    )
