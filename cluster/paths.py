"""Absolute paths for workers, which run in other directories."""

from __future__ import annotations

from pathlib import Path

from configs.schema import Encoder, RunConfig, Tower


def absolute(config: RunConfig) -> RunConfig:
    """The config with every local path made absolute; URIs stay as they are."""
    data = config.data.model_copy(
        update={
            "train": tuple(s.model_copy(update={"path": _absolute(s.path)}) for s in config.data.train),
            "eval": None if config.data.eval is None else _absolute(config.data.eval),
            "cache": None if config.data.cache is None else _absolute(config.data.cache),
        }
    )
    gallery = None if config.evaluate.gallery is None else _absolute(config.evaluate.gallery)
    evaluate = config.evaluate.model_copy(update={"gallery": gallery})
    checkpoints = None if config.cluster.checkpoints is None else _absolute(config.cluster.checkpoints)
    cluster = config.cluster.model_copy(update={"storage": _absolute(config.cluster.storage), "checkpoints": checkpoints})
    uri = config.tracking.uri
    if uri is not None and uri.startswith("sqlite:///"):
        uri = f"sqlite:///{_absolute(uri.removeprefix('sqlite:///'))}"
    tracking = config.tracking.model_copy(update={"uri": uri})
    parts = {"data": data, "encoder": _encoder(config.encoder), "evaluate": evaluate, "cluster": cluster, "tracking": tracking}
    return config.model_copy(update=parts)


def _encoder(encoder: Encoder) -> Encoder:
    return encoder.replaced({key: _tower(part) for key, part in encoder.parts().items()})


def _tower(encoder: Tower) -> Tower:
    """Its folders; what is not there is a name in a registry or in the hub's cache."""
    named = {"init": encoder.init, **{key: encoder.options.get(key) for key in ("path", "model")}}
    folders = {key: text for key, text in named.items() if isinstance(text, str) and _exists(text)}
    return encoder.model_copy(update={key: _absolute(text) for key, text in folders.items()})


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # too long for a file's name, or of a person whom nobody knows
        return False


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())
