"""A trained encoder as an exported folder: proven to be the same, with its match thresholds, described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.building import EVALUATION_BATCH, plain
from cluster.description import Description, git_tags
from cluster.progress import say
from cluster.proof import Proof, prove
from cluster.runfolder import RunFolder
from cluster.warm import origin_of
from configs.schema import RunConfig
from pipelines.manifest import Manifest
from pipelines.mixture import open_sources, parts_of
from pipelines.remote import is_url
from pipelines.stream import evaluation_batches
from trainer.encoders import is_raw
from trainer.encoders.projection import Projection
from trainer.encoders.towers import Towers
from trainer.evaluate import embed
from trainer.export import Exported, export_encoder, load_exported
from trainer.export_projection import export_projection
from trainer.verification import match_thresholds

CALIBRATION = 20_480  # images of the evaluation set that thresholds are measured on, at most; shards hold classes side by side
UNSTATED = "not stated beside the data; find it out before you publish"
LICENCES = "LICENCES.md"
POSITIVE = "positive"  # folder of the other tower, inside that of the anchor
USES = (
    "Searching for images of the same thing by nearest neighbours, grouping, finding duplicates, and telling whether two "
    "images show the same thing, for images like those it was trained on"
)


@dataclass(frozen=True, slots=True)
class Trained:
    """An encoder of a run after so many steps, with what was measured then."""

    encoder: nn.Module
    steps: int
    metrics: Mapping[str, float]


def export_trained(
    config: RunConfig,
    run: RunFolder,
    trained: Trained,
    out: Path,
    *,
    seen: tuple[Tensor, Tensor] | None = None,
    onnx: bool = True,
) -> tuple[Exported, Proof]:
    """Write the folder `out` and compare it with the encoder on real images.

    Of towers that is the anchor's, and the other one lies in `out/positive`.
    seen: vectors [N, D] and groups [N] of the evaluation set, where they have been computed already.
    Raises RuntimeError when the export differs from the encoder, ValueError when the data is not there to compare them.
    """
    whole = trained.encoder
    dims = sorted({*matryoshka_of(config), int(whole.dim)})  # type: ignore[arg-type]
    thresholds = _thresholds(config, whole, dims, seen)
    if not isinstance(whole, Towers):
        return _export(config, run, trained, out, dims, thresholds, onnx=onnx)
    anchor = replace(trained, encoder=whole.anchor)
    done = _export(config, run, anchor, out, dims, thresholds, onnx=onnx, tower="anchor")
    if isinstance(whole.positive, Projection):
        export_projection(whole.positive, out / POSITIVE)
    else:
        positive = replace(trained, encoder=whole.positive)
        _export(config, run, positive, out / POSITIVE, dims, thresholds, onnx=onnx, tower="positive")
    return done


def _export(
    config: RunConfig,
    run: RunFolder,
    trained: Trained,
    out: Path,
    dims: list[int],
    thresholds: Mapping[int, Mapping[str, float]],
    *,
    onnx: bool,
    tower: str | None = None,
) -> tuple[Exported, Proof]:
    """One network."""
    encoder = trained.encoder
    proof = prove(config, encoder)
    tags = _tags(config, run, trained) | ({} if tower is None else {"tower": tower})
    about = {"version": 1, "name": config.name, "tags": tags, "metrics": dict(trained.metrics)}
    about["gate"] = {"metric": config.tracking.promote.metric, "alias": config.tracking.promote.alias}
    done = export_encoder(
        encoder,
        out,
        image_size=config.data.image_size,
        resize=config.data.resize,
        max_pixels=config.data.max_pixels,
        dims=dims,
        thresholds=thresholds,
        card=_card(config, run, trained, tags),
        about=about,
        onnx=onnx,
    )
    if done.why_torch is not None and onnx:
        say(f"exported for torch, not for onnxruntime: {done.why_torch}")
    proof.check(load_exported(out))
    return done, proof


def matryoshka_of(config: RunConfig) -> list[int]:
    """The lengths below the encoder's own that a loss trains for."""
    return sorted({int(dim) for part in config.loss for dim in part.options.get("matryoshka") or ()})


def calibrate(vectors: Tensor, group: Tensor, dims: list[int], *, raw: bool = False) -> dict[int, dict[str, float]]:
    """Match thresholds for every length; none without pairs of the same thing and pairs of different things."""
    try:
        if raw:
            return {vectors.shape[1]: match_thresholds(vectors, group, raw=True)}
        return {dim: match_thresholds(F.normalize(vectors[:, :dim], dim=1), group) for dim in dims}
    except ValueError:
        return {}


def _thresholds(
    config: RunConfig, encoder: nn.Module, dims: list[int], seen: tuple[Tensor, Tensor] | None
) -> dict[int, dict[str, float]]:
    if config.data.eval is None:
        return {}
    if seen is None:
        manifest = Manifest.open(config.data.eval, cache=config.data.cache)
        if manifest.vector_dim:  # images are not compared with images there
            return {}
        batches = evaluation_batches(manifest, config.data, batch=EVALUATION_BATCH)
        few = islice(batches, CALIBRATION // EVALUATION_BATCH)
        found = embed(encoder, few, plain(torch.device("cpu"), torch.float32))
        seen = found.vectors, found.group
    return calibrate(seen[0][:CALIBRATION], seen[1][:CALIBRATION], dims, raw=is_raw(encoder))


def _tags(config: RunConfig, run: RunFolder, trained: Trained) -> dict[str, str]:
    """What is told of the model wherever it goes."""
    train = open_sources(config.data.train, config.data.cache)
    told = Description.read(run.description).tags or git_tags(Path.cwd())  # the commit of the training, where it is known
    tags = {"run": config.name, "kind": train.kind, "steps": str(trained.steps), "data.digest": train.digest}
    if config.data.eval is not None:
        tags["eval.digest"] = Manifest.open(config.data.eval, cache=config.data.cache).digest
    git = {name: told.get(f"mlflow.source.git.{name}") for name in ("commit", "dirty")}
    return tags | {f"git.{name}": value for name, value in git.items() if value is not None}


def _card(config: RunConfig, run: RunFolder, trained: Trained, tags: Mapping[str, str]) -> dict[str, Any]:
    train = open_sources(config.data.train, config.data.cache)
    about: Mapping[str, str] = getattr(trained.encoder, "about", {})
    origin = origin_of(run)
    training = {
        "loss": ", ".join(part.name for part in config.loss),
        "global batch": config.data.batch,
        "encoder": _name(config, tags),
        "parameters": sum(p.numel() for p in trained.encoder.parameters()),
        "steps": trained.steps,
        **({} if origin is None else {"begun from": origin}),
        **({"git commit": tags["git.commit"]} if "git.commit" in tags else {}),
    }
    facts = {"kind": train.kind, "records": train.num_samples, "images": train.num_images, "digest": train.digest}
    evaluated = {"evaluated on": tags["eval.digest"]} if "eval.digest" in tags else {}
    weights = "drawn anew, none" if origin is None else f"those of {origin}"
    return {
        "name": config.name,
        "Intended use": USES,
        "Metrics on images that were not trained on": {name: f"{value:.4f}" for name, value in trained.metrics.items()},
        "Training": training,
        "Data": facts | evaluated,
        "Licences": {"weights it began with": about.get("licence of the weights", weights), "data": _licences(train)},
        **({"Encoder": about} if about else {}),
    }


def _name(config: RunConfig, tags: Mapping[str, str]) -> str:
    """Of the network, and which tower it is."""
    tower = tags.get("tower")
    return config.encoder.name if tower is None else f"{config.encoder.parts()[f'encoder.{tower}'].name}, the {tower} tower"


def _licences(train: Manifest) -> str:
    """What the LICENCES.md beside the shards say, that `nearfar fetch` writes and `nearfar pack` keeps, in one line."""
    lines: list[str] = []
    for part in parts_of(train):
        here = Path(part.location)
        files = [] if is_url(part.location) else [file for at in (here, here.parent) if (file := at / LICENCES).is_file()]
        rows = files[0].read_text("utf-8").splitlines() if files else []
        lines += [" ".join(row.strip("| ").replace("|", ":").split()) for row in rows if row.startswith("|")][2:]
    return "; ".join(dict.fromkeys(lines)) or UNSTATED
