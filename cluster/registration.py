"""From an exported folder to a version in the MLflow registry, and from one registered model to another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from cluster.promotion import Registered, check_model_name, promote, ticket
from cluster.store import fluent, open_client, redact
from trainer.export import ABOUT, CARD, SETTINGS

REQUIREMENTS = {"onnx": "onnxruntime", "torch": "torch"}  # by runtime
COMMON = ("mlflow", "numpy", "pandas", "pillow")
LOGGED_AS = "encoder"  # in its run in MLflow
DESCRIPTION = 5000  # characters that MLflow keeps


@dataclass(frozen=True, slots=True)
class Gate:
    """Who gets `alias`: a version whose `metric` is better than the holder's; with `force` any."""

    metric: str
    alias: str
    force: bool = False


def about(exported: Path) -> dict[str, Any]:
    """What an exported folder says of the model: name, tags, metrics. Raises ValueError when it says nothing."""
    file = exported / ABOUT
    if not file.is_file():
        raise ValueError(f"{exported} was exported by an older nearfar and says nothing of its metrics; export the run again")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def register(
    run_id: str,
    exported: Path,
    *,
    uri: str,
    name: str,
    gate: Gate,
    example: bytes,
    verify: Callable[[Any], None],
    logged_as: str = LOGGED_AS,
) -> Registered:
    """Log `exported` in the run as a pyfunc model, load it back and `verify` it, register it; move the alias last.

    `verify` gets the loaded model and raises what is wrong: then nothing is registered. `example` is one encoded image.
    Raises ValueError for a folder without the gate's metric, RuntimeError when MLflow fails or `verify` does.
    """
    check_model_name(name)
    told = about(exported)
    tags = {**told["tags"], **{f"metric.{key}": repr(float(value)) for key, value in told["metrics"].items()}}
    if f"metric.{gate.metric}" not in tags and not gate.force:
        raise ValueError(f"{exported} has no {gate.metric!r} to be compared by; it has {', '.join(told['metrics']) or 'none'}")
    client = open_client(uri)
    with _telling(uri):
        with _as_it_was(client, run_id):
            source, model_id = _log(run_id, exported, example, logged_as)
        _verify(source, verify)
        description = (exported / CARD).read_text(encoding="utf-8")[:DESCRIPTION]
        rest = {"run_id": run_id, "model_id": model_id, "description": description}
        version = _new_version(client, name, source, {**tags, "verified": "true", **ticket(gate.alias)}, rest)
        return promote(client, name, version, alias=gate.alias, metric=gate.metric, force=gate.force)


def copy(reference: str, *, uri: str, name: str, gate: Gate) -> Registered:
    """A version of another registered model as a version of `name`, with its tags, run and description.

    As MLflow's `copy_model_version`, but created in line for its promotion. The files stay where they are.
    Raises ValueError when there is no such version, or it has not the gate's metric and there is no `force`.
    """
    check_model_name(name)
    client = open_client(uri)
    with _telling(uri):
        found = find_version(client, reference)
        if found.name == name:
            raise ValueError(f"{reference} is a version of {name!r} already; --register names another model")
        if f"metric.{gate.metric}" not in found.tags and not gate.force:
            raise ValueError(f"{reference} has no tag metric.{gate.metric} to be compared by; move the alias with --force")
        tags = {key: value for key, value in found.tags.items() if not key.startswith("promotion.")}
        tags |= {"copied.from": f"models:/{found.name}/{found.version}", **ticket(gate.alias)}
        rest = {"run_id": found.run_id, "model_id": found.model_id, "description": found.description}
        version = _new_version(client, name, f"models:/{found.name}/{found.version}", tags, rest)
        return promote(client, name, version, alias=gate.alias, metric=gate.metric, force=gate.force)


def find_version(client: Any, reference: str) -> Any:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` is now. Raises ValueError when there is none."""
    from mlflow.exceptions import MlflowException

    name, at, alias = reference.removeprefix("models:/").partition("@")
    try:
        return client.get_model_version_by_alias(name, alias) if at else client.get_model_version(*name.rsplit("/", 1))
    except (MlflowException, TypeError) as error:
        raise ValueError(f"{reference} is not in the registry; give models:/NAME@ALIAS or models:/NAME/VERSION") from error


def _log(run_id: str, exported: Path, example: bytes, name: str) -> tuple[str, str]:
    """The address of the logged model, and its id."""
    import mlflow
    import pandas as pd  # type: ignore[import-untyped]

    settings = json.loads((exported / SETTINGS).read_text(encoding="utf-8"))
    packages = sorted((*COMMON, REQUIREMENTS[settings["runtime"]]))
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(exported / "model.py"),
            model_config={"paths": True},  # only what is in here can be given another value by `load_model`
            artifacts={"encoder": str(exported)},
            signature=_signature(int(settings["dim"]), len(settings["dims"]) > 1),
            input_example=pd.DataFrame({"image": [example, example]}),
            pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in packages],
        )
    return info.model_uri, info.model_id


def _signature(dim: int, shortens: bool) -> Any:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    # One column without a name and of any type: a list, an array and a DataFrame of bytes, base64 or paths all pass.
    inputs = Schema([ColSpec(AnyType())])
    outputs = Schema([TensorSpec(np.dtype("float32"), (-1, -1 if shortens else dim))])
    return ModelSignature(
        inputs, outputs, ParamSchema([ParamSpec("dim", DataType.long, dim), ParamSpec("int8", DataType.boolean, False)])
    )


def _verify(source: str, verify: Callable[[Any], None]) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(source)
    try:
        verify(model)
    except Exception as error:
        raise RuntimeError(f"the model that was loaded back is not what was trained: {error}; it is not registered") from error


def _new_version(client: Any, name: str, source: str, tags: Mapping[str, str], rest: Mapping[str, Any]) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.create_model_version(name, source, tags=dict(tags), **rest).version)


@contextmanager
def _as_it_was(client: Any, run_id: str) -> Iterator[None]:
    """The status and the end of a run that was over before: to log into it is to open it again."""
    info = client.get_run(run_id).info
    yield
    if info.end_time is not None:
        client.set_terminated(run_id, info.status, info.end_time)


@contextmanager
def _telling(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        with fluent(uri):
            yield
    except (MlflowException, OSError) as error:
        raise RuntimeError(f"the model could not be registered at {redact(uri)}: {str(error).splitlines()[0]}") from error
