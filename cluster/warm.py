"""Where a warm start comes from: a run, a checkpoint, an exported encoder or a registered model."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.promotion import fluent
from cluster.runfolder import RunFolder
from cluster.store import environment, open_client, redact, tracking_uri
from configs.schema import RunConfig
from trainer import checkpoints
from trainer.checkpoints import Saved

REGISTERED = "models:/"


def weights_of(config: RunConfig) -> dict[str, Tensor]:
    """The encoder's weights that `encoder.init` names; those that the run has begun with, once it has.

    Raises ValueError that says what is not there.
    """
    begun = RunFolder.of(config).init
    if begun.exists():
        held: dict[str, Tensor] = load_file(begun)
        return held
    return _find(config)[0]


def keep(config: RunConfig, folder: RunFolder) -> None:
    """Copy the weights into the run's folder, where all workers find them and where they stay as they are."""
    if config.encoder.init is None or folder.init.exists():
        return
    weights, origin = _find(config)
    temporary = folder.init.with_name(f".{folder.init.name}.{os.getpid()}")
    save_file({name: t.contiguous() for name, t in weights.items()}, temporary, metadata={"origin": origin})
    temporary.replace(folder.init)


def origin_of(folder: RunFolder) -> str | None:
    """What the run has begun from, with the step or version that it was then."""
    if not folder.init.exists():
        return None
    with safe_open(folder.init, "pt") as file:
        return str(file.metadata()["origin"])


def _find(config: RunConfig) -> tuple[dict[str, Tensor], str]:
    """Weights, and where they are from."""
    name = config.encoder.init
    assert name is not None
    if name.startswith(REGISTERED):
        return _registered(name, tracking_uri(config.tracking, Path(config.cluster.storage)))
    path = Path(name).expanduser()
    if (path / "program.pt2").exists():
        return _exported(path), str(path)
    if (path / "state.json").exists():
        try:
            saved = checkpoints.read(path.parent, path.name)
        except ValueError as error:
            raise ValueError(f"encoder.init: {error}") from error
        return _checkpoint(saved), str(path)
    run = RunFolder(path)
    if not run.exists():
        raise ValueError(f"encoder.init: {path} is no run folder, checkpoint or exported encoder; or give models:/NAME@ALIAS")
    store = run.checkpoints(run.config())
    newest = checkpoints.newest(store)
    if newest is None:
        raise ValueError(f"encoder.init: {store.location} holds no complete checkpoint")
    return _checkpoint(newest), f"{path}, step {newest.step}"


def _checkpoint(saved: Saved) -> dict[str, Tensor]:
    file = "average.safetensors" if "average.safetensors" in saved.files else "encoder.safetensors"
    with saved.store.fetched(saved.name, file) as path:
        held: dict[str, Tensor] = load_file(path)
    return held


def _exported(folder: Path) -> dict[str, Tensor]:
    program = torch.export.load(next(folder.rglob("program.pt2")))
    return {name.removeprefix("encoder."): t.detach() for name, t in program.state_dict.items()}


def _registered(name: str, uri: str) -> tuple[dict[str, Tensor], str]:
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ValueError(f"encoder.init: {name} is not to be had: there is no {uri}; set tracking.uri")
    client = open_client(uri)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    with fluent(uri), environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}):
        try:
            model, at, alias = name.removeprefix(REGISTERED).partition("@")
            version = client.get_model_version_by_alias(model, alias).version if at else None
            fixed = f"{REGISTERED}{model}/{version}" if at else name
            folder = Path(download_artifacts(artifact_uri=fixed))
        except (MlflowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"encoder.init: {name} is not to be had from MLflow at {redact(uri)}: {reason}") from error
    if next(folder.rglob("program.pt2"), None) is None:
        raise ValueError(f"encoder.init: {name} was not registered by nearfar: it holds no program.pt2")
    return _exported(folder), fixed
