"""Everything about a run that can be refused before any worker starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.building import objective_for
from cluster.disk import check_database, check_places, check_space
from cluster.estimate import allowance, encoder_settings, refuse_too_much, worker_bytes
from cluster.evaluation import EvaluationSet
from cluster.promotion import check_model_name
from cluster.store import tracking_uri
from cluster.towers import check_kind, check_members, with_input_dim
from cluster.warm import weights_of
from configs.evaluation import ON_THE_SPHERE
from configs.registry import given
from configs.schema import RunConfig
from pipelines.batch import Batch
from pipelines.growth import History
from pipelines.manifest import Manifest
from pipelines.mixture import class_shares, open_sources
from pipelines.stream import Loader, units_per_epoch
from trainer.backward import compare
from trainer.encoders import build_encoder, is_raw
from trainer.encoders.freeze import depends_on_batch
from trainer.objective import Objective
from trainer.optim import build_optimizer
from trainer.warm import begin_from


@dataclass(frozen=True, slots=True)
class Facts:
    """What a config amounts to."""

    kind: str
    samples: int
    eval_samples: int
    steps: int
    epochs: float
    parameters: int
    worker_bytes: int  # weights, gradients, optimizer and activations of one worker, estimated

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(config: RunConfig, histories: Sequence[History] | None = None) -> Facts:
    """Try all of a config that needs no worker. `histories`: of the data of a run that goes on.

    Raises ValueError (or RuntimeError for what this machine lacks) that names the setting and the remedy.
    """
    manifest = open_training(config)
    config = with_input_dim(config, manifest)
    check_kind(config, manifest)
    per_epoch = _check_data(config, manifest, histories)
    steps = number_of_steps(config, per_epoch)
    eval_samples = _check_eval(config, manifest)
    check_places(config)
    _check_tracking(config)
    _check_schedule(config, steps)
    with allowance(encoder_settings(config)):
        encoder = build_encoder(config.encoder, config.data.image_size)
    check_members(config, manifest, encoder)
    if config.encoder.warm:
        begin_from(encoder, config.encoder, weights_of(config))
    with allowance(_given_to_losses(config)):
        objective = objective_for(config, manifest, encoder)
    _check_views(config, objective)
    _check_raw(config, encoder, objective)
    build_optimizer(config.optim, [encoder, objective])
    _try_objective(config, manifest, objective, encoder)
    _check_encoder(config, encoder)
    if not config.encoder.towers:
        _check_eval_vectors(config, int(encoder.dim))  # type: ignore[arg-type]
    _check_shards(config)
    parameters = sum(p.numel() for p in encoder.parameters())
    shares = worker_bytes(config, manifest, encoder, objective)
    refuse_too_much(config, shares)
    check_space(config, parameters)
    units = config.data.batch // (config.data.per_class or 1)
    return Facts(
        kind=manifest.kind,
        samples=manifest.num_samples,
        eval_samples=eval_samples,
        steps=steps,
        epochs=steps * units / per_epoch,
        parameters=parameters,
        worker_bytes=sum(shares.values()),
    )


def number_of_steps(config: RunConfig, per_epoch: int) -> int:
    """Optimizer steps of the run; `per_epoch` counts records, or K-row units for P x K batches."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, math.ceil(config.train.epochs * per_epoch / (config.data.batch // (config.data.per_class or 1))))


def open_training(config: RunConfig) -> Manifest:
    """The data to train on. Raises ValueError that names the setting."""
    try:
        return open_sources(config.data.train, config.data.cache)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"data.train: {error}") from error


def _check_data(config: RunConfig, manifest: Manifest, histories: Sequence[History] | None) -> int:
    per_epoch = units_per_epoch(manifest, config.data, histories)
    views = [part.options.get(key) for part in config.loss for key in ("queries", "candidates")]
    if manifest.kind == "labelled" and config.data.per_class is None and config.data.views == 1:
        if "other_view" in views or "anchors" in views:
            raise ValueError(
                "loss: anchors and other_view need pairs, triplets, data.per_class or data.views; labelled images have one view"
            )
        expected = (config.data.batch - 1) * float((class_shares(manifest) ** 2).sum())
        if expected < 1:
            raise ValueError(
                f"data.per_class: not set, so an image meets on average only {expected:.2g} others of its class in a batch "
                f"of {config.data.batch}; set data.per_class (2 to 8 are usual)"
            )
    return per_epoch


def _check_views(config: RunConfig, objective: nn.Module) -> None:
    if config.data.views == 2 and config.data.per_class is None and any(hasattr(m, "set_classes") for m in objective.modules()):
        raise ValueError(
            "data.views: 2 without data.per_class uses no labels, but a loss with class centres is made of them; set "
            "data.per_class, or take another loss (info_nce, sup_con)"
        )


def _check_schedule(config: RunConfig, steps: int) -> None:
    optim = config.optim
    if optim.warmup_steps >= steps:
        raise ValueError(f"optim.warmup_steps {optim.warmup_steps} leaves nothing of {steps} steps; lower it")
    if optim.milestones and not optim.warmup_steps <= optim.milestones[0] <= optim.milestones[-1] < steps:
        raise ValueError(
            f"optim.milestones: {list(optim.milestones)} must lie between the warm-up ({optim.warmup_steps} steps) and the end "
            f"({steps} steps)"
        )


def _check_eval(config: RunConfig, train: Manifest) -> int:
    if config.data.eval is None:
        return 0
    manifest = _opened("data.eval", config.data.eval, config.data.cache)
    if config.evaluate.gallery is not None:
        _opened("evaluate.gallery", config.evaluate.gallery, config.data.cache)
    if config.evaluate.gallery is None and manifest.kind == "labelled" and int(manifest.classes.counts.max()) < 2:
        raise ValueError(f"data.eval: no class in {config.data.eval} has two images, so nothing can be found; add images")
    early = config.train.early_stop
    named = (*config.evaluate.metrics, config.tracking.promote.metric, *(() if early is None else (early.metric,)))
    try:
        EvaluationSet.open(config.data.eval, config.evaluate, cache=config.data.cache).check(named)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"evaluate: {error}") from error
    return manifest.num_samples


def _opened(setting: str, path: str, cache: str | None) -> Manifest:
    try:
        return Manifest.open(path, cache=cache)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{setting}: {error}") from error


def _check_eval_vectors(config: RunConfig, dim: int) -> None:
    """Those of `data.train` are compared when the loss is tried."""
    for setting, place in (("data.eval", config.data.eval), ("evaluate.gallery", config.evaluate.gallery)):
        given = 0 if place is None else Manifest.open(place, cache=config.data.cache).vector_dim
        if given not in (0, dim):
            raise ValueError(
                f"{setting}: its vectors have {given} numbers, but encoder.dim is {dim}; set encoder.dim to {given}"
            )


def _check_tracking(config: RunConfig) -> None:
    tracking = config.tracking
    if tracking.register_as is not None and config.data.eval is None:
        raise ValueError("tracking.register: a model is registered with its metrics, so data.eval must be given")
    if tracking.register_as is not None:
        check_model_name(tracking.register_as)
    uri = tracking_uri(tracking, Path(config.cluster.storage))
    if tracking.enabled:
        check_database(uri)


def _check_encoder(config: RunConfig, encoder: nn.Module) -> None:
    norms = [n for n, m in encoder.named_modules() if depends_on_batch(m)]
    if norms and (config.train.micro_batch is not None or config.cluster.most_workers > 1):
        side = norms[0].partition(".")[0]
        key, part = next(item for item in config.encoder.parts().items() if item[0] in ("encoder", f"encoder.{side}"))
        raise ValueError(
            f"encoder {part.name!r} has BatchNorm ({norms[0]} and {len(norms) - 1} more): its result would depend on "
            f"how the batch is split; set {key}.freeze_batchnorm: true, use an encoder with GroupNorm or LayerNorm, or one "
            "worker without train.micro_batch"
        )


def _check_raw(config: RunConfig, encoder: nn.Module, objective: nn.Module) -> None:
    """Raw vectors are compared by distance, so the loss must see their length, and nothing may look at a sphere."""
    if not is_raw(encoder):
        return
    name = f"encoder {config.encoder.name!r} gives vectors of any length, compared by euclidean distance"
    if any(isinstance(part, Objective) and part.normalize for part in objective.modules()):
        raise ValueError(
            f"loss.normalize: {name}, but the loss scales them to length 1 and would not see it; set loss.normalize: false, "
            "or encoder.raw: false to compare by cosine"
        )
    if any(part.options.get("matryoshka") for part in config.loss):
        raise ValueError(f"loss.matryoshka: {name}; shorter lengths are for unit vectors; drop it or set encoder.raw: false")
    early = config.train.early_stop
    for setting, metric in (
        ("tracking.promote.metric", config.tracking.promote.metric),
        *(() if early is None else (("train.early_stop.metric", early.metric),)),
    ):
        if metric in ON_THE_SPHERE:
            raise ValueError(f"{setting}: {name}, and {metric} is of unit vectors; take for instance recall_at_1 or eer")


def _check_shards(config: RunConfig) -> None:
    if config.train.reproducible and any(part.options.get("shard") is True for part in config.loss):
        raise ValueError(
            "loss.shard: with train.reproducible every worker computes the whole loss, so none can hold a share of the "
            "centres; leave shard out, or set train.reproducible to false"
        )


def _try_objective(config: RunConfig, manifest: Manifest, objective: nn.Module, encoder: nn.Module) -> None:
    """Let the loss see a few records of this very data: one that needs pairs, classes or targets says so now."""
    batch = _few_records(config, manifest)
    num_vectors = batch.num_rows if config.encoder.towers else batch.num_images  # others take given vectors as they are
    vectors = torch.randn(num_vectors, int(encoder.dim), requires_grad=True)  # type: ignore[arg-type]
    try:
        value, _ = compare(objective, vectors, batch)
        learned = [vectors, *(p for p in objective.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(value, learned, allow_unused=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"loss {' + '.join(part.name for part in config.loss)} on {manifest.kind} data: {error}") from error
    if not all(bool(torch.isfinite(t).all()) for t in (value, *grads) if t is not None):
        raise ValueError(
            f"loss: {float(value.detach())} on random vectors, or its gradient is not finite, with {_given_to_losses(config)}; "
            "take usual numbers"
        )


def _given_to_losses(config: RunConfig) -> str:
    return "; ".join(given("loss", part) for part in config.loss)


def _few_records(config: RunConfig, manifest: Manifest) -> Batch:
    """A small batch of the training data, whose images are as good as empty. Raises ValueError when none can be read."""
    size = min(config.data.batch, 16 * (config.data.per_class or 1))
    small = {"batch": size, "prefetch": 1, "threads": 1, "image_size": 8}
    bad: list[str] = []
    few = config.data.model_copy(update={**small, "max_bad_fraction": 1.0, "max_bad_shard_fraction": 1.0})
    with Loader(manifest, few, seed=config.seed, on_bad=lambda report: bad.append(str(report["reason"]))) as stream:
        batch = next(stream)
        if stream.bad == stream.images:
            raise ValueError(f"data.train: none of the first {stream.images} images can be used: {bad[0]} (data.max_pixels?)")
    return batch
