"""The parts of a run, built from its config."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster.context import RankContext
from cluster.evaluation import EvaluationSet, Loading
from cluster.towers import with_input_dim
from configs.schema import RunConfig
from pipelines import augment
from pipelines.batch import Batch
from pipelines.manifest import Manifest
from trainer import collectives, state
from trainer.control import Control
from trainer.encoders import build_encoder
from trainer.objective import build_objective
from trainer.optim import Average, build_optimizer
from trainer.warm import begin_from

EVALUATION_BATCH = 256  # images a rank embeds at once; changes no result


def build_training(
    config: RunConfig, manifest: Manifest, device: torch.device, dtype: torch.dtype, *, init: Path | None = None
) -> state.Training:
    """Encoder, averaged encoder, objective and optimizer on `device`; `init`: file of weights to begin with."""
    config = with_input_dim(config, manifest)
    encoder = build_encoder(config.encoder, config.data.image_size)
    if init is not None:
        begin_from(encoder, config.encoder, load_file(init))
    encoder = encoder.to(device=device, dtype=dtype)
    if config.train.channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = objective_for(config, manifest, encoder).to(device=device, dtype=dtype)
    average = Average(encoder, config.train.ema)
    keys = Average(encoder, config.train.momentum) if config.train.momentum else None
    optimizer = build_optimizer(config.optim, [encoder, objective])
    return state.Training(encoder, average, objective, optimizer, keys, Control(config.train))


def objective_for(config: RunConfig, manifest: Manifest, encoder: nn.Module) -> nn.Module:
    """The config's objective, told of the encoder's dimension and of the data's classes."""
    classes = manifest.classes if manifest.kind == "labelled" else None
    groups = None if classes is None else torch.from_numpy(classes.groups)
    counts = None if classes is None else torch.from_numpy(classes.counts)
    # Every rank computes a reproducible loss whole, so it holds all class centres.
    with collectives.alone() if config.train.reproducible else contextlib.nullcontext():
        return build_objective(config.loss, dim=int(encoder.dim), groups=groups, counts=counts)  # type: ignore[arg-type]


def augmented(config: RunConfig, dtype: torch.dtype) -> Callable[[Batch], Tensor]:
    """Batch to augmented float images on the batch's device."""

    def prepare(batch: Batch) -> Tensor:
        images = augment.apply(batch.images, batch.draws, config.data.augment, dtype)
        return images.contiguous(memory_format=torch.channels_last) if config.train.channels_last else images

    return prepare


def plain(device: torch.device, dtype: torch.dtype) -> Callable[[Batch], Tensor]:
    """Batch to float images on `device`, as they are."""
    return lambda batch: batch.images.to(device, non_blocking=True).contiguous().to(dtype) / 255


def evaluator(
    config: RunConfig, context: RankContext, dtype: torch.dtype, beat: Callable[[], None] = lambda: None
) -> Callable[[nn.Module, bool], dict[str, float]] | None:
    """Metrics on `data.eval`, or nothing when there is no such set; told True, those of `evaluate.at_end`, too.

    Then `tracking.promote.metric` also has the bounds of its interval, `..._low` and `..._high`. `beat` is called for every
    batch.
    """
    if config.data.eval is None:
        return None
    sets = EvaluationSet.open(config.data.eval, config.evaluate, cache=config.data.cache)
    fixed = config.train.reproducible
    loading = Loading(config.data, context, config.train.piece if fixed else EVALUATION_BATCH, fixed, beat)
    prepare, gate = plain(context.device, dtype), config.tracking.promote.metric

    def run(encoder: nn.Module, at_end: bool) -> dict[str, float]:
        resamples = config.evaluate.bootstrap if at_end else 0
        found = sets.measure(encoder, prepare, config.metrics(at_end=at_end), loading, resamples=resamples)
        bounds = found.intervals.get(gate)
        more = {} if bounds is None else {f"{gate}_low": bounds[0], f"{gate}_high": bounds[1]}
        return {f"val/{name}": value for name, value in (found.values | more).items()}

    return run
