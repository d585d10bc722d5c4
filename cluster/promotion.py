"""From an exported folder to a version in the MLflow registry that was loaded back and checked before it gets the alias."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from cluster.store import fluent, open_client, redact
from configs.evaluation import goodness

logger = logging.getLogger(__name__)

REQUIREMENTS = ("mlflow", "torch", "numpy", "pillow", "pandas")


@dataclass(frozen=True, slots=True)
class Registered:
    """A version of a registered model; `promoted` tells whether `alias` points to it now, `holder` who had it before."""

    name: str
    version: str
    alias: str
    promoted: bool
    holder: str | None

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` takes."""
        return f"models:/{self.name}@{self.alias}" if self.promoted else f"models:/{self.name}/{self.version}"


def check_model_name(name: str) -> None:
    """Raise ValueError for a name that the registry would refuse after hours of training."""
    if not name.strip() or "/" in name or ":" in name:
        raise ValueError(f"tracking.register {name!r} is no model name: it may not be empty or hold '/' or ':'")


def register(
    run_id: str,
    exported: Path,
    *,
    uri: str,
    name: str,
    alias: str,
    metric: str,
    value: float,
    example: bytes,
    verify: Callable[[Any], None],
    tags: Mapping[str, str] | None = None,
) -> Registered:
    """Log `exported` in the run as a pyfunc model, register it, load it back and `verify` it; move `alias` last.

    The alias moves when no version holds it, or when `value` of `metric` is at least as good as that of the
    holder. `verify` gets the loaded model and raises what is wrong: then the version stays, tagged, without the alias.
    `example` is one encoded image. Raises RuntimeError when MLflow fails or `verify` does.
    """
    check_model_name(name)
    client = open_client(uri)
    tags = {f"metric.{metric}": repr(float(value)), **(tags or {})}
    try:
        with fluent(uri):
            model_uri, model_id = _log(run_id, exported, example)
            version = _new_version(client, name, model_uri, run_id, model_id, tags)
            _verified(client, name, version, verify)
            holder = _holder(client, name, alias)
            promoted = holder is None or goodness(metric, value) >= _goodness(holder, metric)
            if promoted:
                client.set_registered_model_alias(name, alias, version)
    except _mlflow_errors() as error:
        raise RuntimeError(f"the model could not be registered at {redact(uri)}: {str(error).splitlines()[0]}") from error
    return Registered(name, version, alias, promoted, None if holder is None else str(holder.version))


def _log(run_id: str, exported: Path, example: bytes) -> tuple[str, str | None]:
    import mlflow
    import numpy as np
    import pandas as pd  # type: ignore[import-untyped]
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    dim = int(json.loads((exported / "preprocessing.json").read_text(encoding="utf-8"))["dim"])
    # One column without a name and of any type: a list, an array and a DataFrame of bytes, base64 or paths all pass.
    inputs, outputs = Schema([ColSpec(AnyType())]), Schema([TensorSpec(np.dtype("float32"), (-1, dim))])
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="encoder",
            python_model=str(exported / "model.py"),
            artifacts={"encoder": str(exported)},
            signature=ModelSignature(inputs, outputs),
            input_example=pd.DataFrame({"image": [example, example]}),
            pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in REQUIREMENTS],
        )
    return info.model_uri, getattr(info, "model_id", None)


def _new_version(client: Any, name: str, source: str, run_id: str, model_id: str | None, tags: Mapping[str, str]) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.create_model_version(name, source, run_id=run_id, tags=dict(tags), model_id=model_id).version)


def _verified(client: Any, name: str, version: str, verify: Callable[[Any], None]) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(f"models:/{name}/{version}")
    try:
        verify(model)
    except Exception as error:
        client.set_model_version_tag(name, version, "verified", "false")
        raise RuntimeError(f"version {version} of {name!r} is not what was trained: {error}; the alias did not move") from error
    client.set_model_version_tag(name, version, "verified", "true")


def _holder(client: Any, name: str, alias: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # sqlite answers with the second
            return None
        raise


def _goodness(version: Any, metric: str) -> float:
    """Of the metric a version was registered with; one registered elsewhere has none and gives way."""
    value = version.tags.get(f"metric.{metric}")
    return -math.inf if value is None else goodness(metric, float(value))


def _mlflow_errors() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError)
