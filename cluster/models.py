"""What MODEL on the command line may be: a run, a checkpoint, an exported encoder, a registered model or an MLflow run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.runfolder import RunFolder
from cluster.store import environment, fluent, open_client, redact, tracking_uri
from configs.schema import Data, RunConfig, Tracking
from trainer import checkpoints, state
from trainer.checkpoints import Saved
from trainer.encoders import build_encoder, is_raw
from trainer.encoders.towers import Towers, image_networks
from trainer.export import FromBytes

REGISTERED = "models:/"
PROGRAM, SETTINGS = "program.pt2", "preprocessing.json"
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Model:
    """An encoder with the preprocessing that it was trained for. `origin`: where it is from, with its step or version."""

    module: nn.Module  # uint8 [n, 3, image_size, image_size] -> vectors [n, dim]
    origin: str
    image_size: int
    resize: str
    dim: int
    max_pixels: int
    raw: bool = False  # vectors of any length, compared by euclidean distance

    def data(self, shards: str) -> Data:
        """Settings that read `shards` as the encoder wants to see them."""
        about = {"image_size": self.image_size, "resize": self.resize, "max_pixels": self.max_pixels}
        return Data.model_validate({"train": shards, "eval": shards, **about})


def open_model(reference: str, *, uri: str | None = None, device: torch.device | str = "cpu") -> Model:
    """The encoder that `reference` names, in float32 and eval mode.

    reference: a run folder, one of its checkpoints, an exported folder, `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or
    the id of an MLflow run. `uri`: of MLflow; default: MLFLOW_TRACKING_URI, else runs/mlflow.db.
    Raises ValueError that says what is not there.
    """
    path = Path(reference).expanduser().absolute()
    if in_mlflow(reference):
        folder, origin = fetch(reference, tracking_uri(Tracking(uri=uri), Path("runs")))
        return _exported(folder, origin, device)
    if (path / PROGRAM).exists():
        return _exported(path, str(path), device)
    run, saved = find_checkpoint(path)
    return _trained(run, saved, device)


def in_mlflow(reference: str) -> bool:
    """Whether it names a registered model or an MLflow run, and nothing on this machine's disk."""
    is_run = _RUN_ID.fullmatch(reference) is not None and not Path(reference).exists()
    return is_run or reference.startswith(REGISTERED)


def find_checkpoint(path: Path) -> tuple[RunFolder, Saved]:
    """The run and the checkpoint at `path`: the newest complete one of a run folder, or that very one. Raises ValueError."""
    if (path / "state.json").exists():
        return RunFolder(path.parent.parent), checkpoints.read(path.parent, path.name)
    run = RunFolder(path)
    if not run.exists():
        raise ValueError(f"{path} is no run folder, checkpoint or exported encoder; or give models:/NAME@ALIAS")
    store = run.checkpoints(run.config())
    newest = checkpoints.newest(store)
    if newest is None:
        raise ValueError(f"{store.location} holds no complete checkpoint")
    return run, newest


def fetch(reference: str, uri: str) -> tuple[Path, str]:
    """A local folder with the model `models:/...`, or of the MLflow run with that id, and its name with the version.

    Raises ValueError when it is not to be had.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ValueError(f"{reference} is not to be had: there is no {uri}; set tracking.uri, or MLFLOW_TRACKING_URI")
    client = open_client(uri)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    with fluent(uri), environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}):
        try:
            if not reference.startswith(REGISTERED):
                fixed = f"runs:/{reference}/encoder"
            else:
                model, at, alias = reference.removeprefix(REGISTERED).partition("@")
                version = client.get_model_version_by_alias(model, alias).version if at else None
                fixed = f"{REGISTERED}{model}/{version}" if at else reference
            folder = Path(download_artifacts(artifact_uri=fixed))
        except (MlflowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{reference} is not to be had from MLflow at {redact(uri)}: {reason}") from error
    program = min(folder.rglob(PROGRAM), key=lambda path: len(path.parts), default=None)  # not that of `positive/`
    if program is None:
        raise ValueError(f"{reference} was not registered by nearfar: it holds no {PROGRAM}")
    return program.parent, fixed


def exported_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in an exported folder, named as in the encoder."""
    program = torch.export.load(folder / PROGRAM)
    return {name.removeprefix("encoder."): t.detach() for name, t in program.state_dict.items()}


def _exported(folder: Path, origin: str, device: torch.device | str) -> Model:
    program = torch.export.load(folder / PROGRAM)
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(device))
    about = json.loads((folder / SETTINGS).read_text("utf-8"))
    settings = {name: about[name] for name in ("image_size", "resize", "dim", "max_pixels")}
    module, raw = program.module(), about.get("distance") == "euclidean"
    module.raw = raw  # as the encoder itself says it
    return Model(module, origin, **settings, raw=raw)


def _trained(run: RunFolder, saved: Saved, device: torch.device | str) -> Model:
    if not run.exists():
        raise ValueError(f"{saved.store.location} lies in no run's folder, so there is no config to build the encoder from")
    config = run.config()
    encoder = build_trained(config, saved).to(device)
    origin = f"{run.path}, step {saved.step}"
    data = config.data
    shape = (data.image_size, data.resize, int(encoder.dim), data.max_pixels)  # type: ignore[arg-type]
    return Model(_behind_bytes(encoder), origin, *shape, raw=is_raw(encoder))


def _behind_bytes(encoder: nn.Module) -> nn.Module:
    """For uint8 images; of towers each that takes images."""
    if not isinstance(encoder, Towers):
        return FromBytes(encoder)
    for tower in image_networks(encoder):
        side = "anchor" if tower is encoder.anchor else "positive"
        setattr(encoder, side, FromBytes(tower))
    return encoder


def build_trained(config: RunConfig, saved: Saved) -> nn.Module:
    """The (averaged) encoder of a checkpoint, in float32 on the CPU, in eval mode."""
    encoder = build_encoder(config.encoder, config.data.image_size)
    state.load_module(saved, "average" if "average.safetensors" in saved.files else "encoder", encoder)
    return encoder.eval()
