"""Where a warm start comes from: a run, a checkpoint, an exported encoder or a registered model."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.models import PROGRAM, REGISTERED, exported_weights, fetch, find_checkpoint
from cluster.runfolder import RunFolder
from cluster.store import tracking_uri
from configs.encoder import SIDES
from configs.schema import RunConfig, Tower
from trainer.checkpoints import Saved


def weights_of(config: RunConfig) -> dict[str, Tensor]:
    """The encoder's weights that `encoder.init` names; those that the run has begun with, once it has.

    Raises ValueError that says what is not there.
    """
    begun = RunFolder.of(config).init
    if begun.exists():
        held: dict[str, Tensor] = load_file(begun)
        return held
    return _all(config)[0]


def keep(config: RunConfig, folder: RunFolder) -> None:
    """Copy the weights into the run's folder, where all workers find them and where they stay as they are."""
    if not config.encoder.warm or folder.init.exists():
        return
    weights, origin = _all(config)
    temporary = folder.init.with_name(f".{folder.init.name}.{os.getpid()}")
    save_file({name: t.contiguous() for name, t in weights.items()}, temporary, metadata={"origin": origin})
    temporary.replace(folder.init)


def origin_of(folder: RunFolder) -> str | None:
    """What the run has begun from, with the step or version that it was then."""
    if not folder.init.exists():
        return None
    with safe_open(folder.init, "pt") as file:
        return str(file.metadata()["origin"])


def _all(config: RunConfig) -> tuple[dict[str, Tensor], str]:
    """The weights of every network that has `init`, and where they are from; those of towers begin with their side's name."""
    if not config.encoder.towers:
        return _find(config, "encoder", config.encoder)
    weights: dict[str, Tensor] = {}
    origins = []
    for key, part in config.encoder.parts().items():
        if part.init is not None:
            side = key.removeprefix("encoder.")
            found, origin = _find(config, key, part)
            weights |= {f"{side}.{name}": t for name, t in found.items()}
            origins.append(f"{side}: {origin}")
    return weights, ", ".join(origins)


def _find(config: RunConfig, key: str, part: Tower) -> tuple[dict[str, Tensor], str]:
    """Weights, and where they are from. Of a run with towers one network takes the anchor's, a tower its own side's."""
    name, side = part.init, "positive" if key == "encoder.positive" else "anchor"
    assert name is not None
    try:
        if name.startswith(REGISTERED):
            folder, origin = fetch(name, tracking_uri(config.tracking, Path(config.cluster.storage)))
            return exported_weights(folder), origin
        path = Path(name).expanduser()
        if (path / PROGRAM).exists():
            return exported_weights(path), str(path)
        _, saved = find_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{key}.init: {error}") from error
    return _of_side(_checkpoint(saved), side), str(path) if (path / "state.json").exists() else f"{path}, step {saved.step}"


def _of_side(weights: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """Of towers one side's, under the names it has by itself; of one network all."""
    if not all(name.startswith(tuple(f"{one}." for one in SIDES)) for name in weights):
        return weights
    return {name.removeprefix(f"{side}."): t for name, t in weights.items() if name.startswith(f"{side}.")}


def _checkpoint(saved: Saved) -> dict[str, Tensor]:
    file = "average.safetensors" if "average.safetensors" in saved.files else "encoder.safetensors"
    with saved.store.fetched(saved.name, file) as held:
        weights: dict[str, Tensor] = load_file(held)
    return weights
