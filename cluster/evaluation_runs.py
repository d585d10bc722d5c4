"""An evaluation as a run of its own in MLflow, inside the run that trained the model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.description import DatasetRef
from cluster.models import PROGRAM, REGISTERED, find_checkpoint, in_mlflow
from cluster.registration import find_version
from cluster.spool import ILLEGAL, Position
from cluster.store import experiment_id, fluent, open_client, redact, tracking_uri
from configs.schema import Tracking
from pipelines.manifest import Manifest

MOST = 1000  # metrics that MLflow takes at once


def log_evaluation(model: str, shards: str, result: Mapping[str, Any], *, uri: str | None = None) -> str:
    """Log what was measured of `model` on `shards`, and return the id of the new run.

    result: `metrics`, name -> value, and perhaps `intervals`, name -> (low, high); all of it is kept as evaluation.json. The
    metrics have the names that training gives them, `val/recall_at_1`, so that MLflow shows them side by side. The run lies
    inside the model's own run, where that is known.
    Raises ValueError for a model that is not there, RuntimeError when MLflow does not take it.
    """
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    parent, address, storage = _parent(model, uri)
    client, now = open_client(address), int(time.time() * 1000)
    manifest = Manifest.open(shards)
    values = dict(result["metrics"])
    for name, (low, high) in dict(result.get("intervals") or {}).items():
        values |= {f"{name}_low": low, f"{name}_high": high}
    metrics = [Metric(f"val/{ILLEGAL.sub('_', name)}", float(value), now, 0) for name, value in values.items()]
    tags = {"nearfar.model": model, "nearfar.eval_digest": manifest.digest, "nearfar.kind": manifest.kind}
    profile = {"records": manifest.num_samples, "images": manifest.num_images}
    name = Path(shards).name
    dataset = DatasetRef(name, manifest.digest, shards, "evaluation", profile)
    try:
        with fluent(address):
            experiment = _experiment(client, parent) or experiment_id(client, Tracking().experiment, address, storage)
            nested = {} if parent is None else {"mlflow.parentRunId": parent}
            run = client.create_run(experiment, tags=tags | nested, run_name=f"evaluation on {name}").info.run_id
            for start in range(0, len(metrics), MOST):
                client.log_batch(run, metrics=metrics[start : start + MOST])
            client.log_inputs(run, [dataset.entity()])
            client.log_text(run, json.dumps(dict(result), indent=1), "evaluation.json")
            client.set_terminated(run, "FINISHED")
    except (MlflowException, OSError) as error:
        raise RuntimeError(f"MLflow at {redact(address)} did not take the evaluation: {str(error).splitlines()[0]}") from error
    return str(run)


def _parent(model: str, uri: str | None) -> tuple[str | None, str, Path]:
    """The run that trained `model`, where it is known; MLflow's address, and the folder of storage."""
    path = Path(model).expanduser().absolute()
    if in_mlflow(model):
        address = tracking_uri(Tracking(uri=uri), Path("runs"))
        return _run_of_version(model, address) if model.startswith(REGISTERED) else model, address, Path("runs")
    if (path / PROGRAM).exists():
        return None, tracking_uri(Tracking(uri=uri), Path("runs")), Path("runs")
    run, _ = find_checkpoint(path)
    tracking = run.config().tracking
    address = tracking_uri(tracking.model_copy(update={"uri": uri or tracking.uri}), run.path.parent)
    return Position.read(run.path / "tracking.json").run_id, address, run.path.parent


def _run_of_version(model: str, address: str) -> str | None:
    with fluent(address):
        run: str | None = find_version(open_client(address), model).run_id
    return run


def _experiment(client: Any, parent: str | None) -> str | None:
    return None if parent is None else str(client.get_run(parent).info.experiment_id)
