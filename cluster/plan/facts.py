"""What a plan must know of a config's data, encoder and losses: measured where they are at hand, else as told."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from cluster.check import open_training
from cluster.estimate import IMAGES, allowance, encoder_settings, saved_bytes
from cluster.plan.memory import CHUNK_BYTES
from cluster.plan.models import MODELS, EncoderFacts, published
from cluster.plan.wire import LossFacts
from configs.registry import given
from configs.schema import Part, RunConfig
from pipelines.manifest import Manifest
from pipelines.mixture import parts_of
from pipelines.stream import Loader, units_per_epoch
from trainer.centres import SHARD_ABOVE, Centres
from trainer.combine import Prefixes, Weighted
from trainer.encoders import build_encoder
from trainer.encoders.towers import image_networks
from trainer.losses.distill import Similarities
from trainer.losses.elementwise import Elementwise
from trainer.losses.softmax_head import SoftmaxHead
from trainer.objective import Objective, build_objective
from trainer.rows import RowLoss

DECODE_RATE, DECODE_S = 600.0, 1.5  # images/s of a core: 500x375 JPEGs to 224 crops; how long it is measured
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LIKE = {  # beginnings of timm's names
    "vit_small_patch16": "vit-s16",
    "vit_base_patch16": "vit-b16",
    "vit_base_patch32": "vit-b32",
    "vit_large_patch16": "vit-l16",
    "vit_large_patch14": "vit-l14",
    "vit_huge_patch14": "vit-h14",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
}


@dataclass(frozen=True, slots=True)
class Told:
    """What the command line says of data that is not there yet."""

    samples: int | None = None
    image_kb: float = 100.0
    kind: str = "pair"
    classes: int | None = None


@dataclass(frozen=True, slots=True)
class DataFacts:
    """`record_bytes` with tar headers; `rows_per_record`: images and vectors; `decode_rate`: images/s of one core.

    `remote`: read in blocks.
    """

    kind: str
    num_records: int
    images_per_record: float
    rows_per_record: float
    record_bytes: float
    units_per_epoch: int
    classes: int
    target_dim: int
    remote: bool
    decode_rate: float
    measured: bool  # the decode rate


def data_facts(config: RunConfig, told: Told, decode_rate: float | None = None) -> DataFacts:
    """Of data.train, or of what was told. Raises ValueError when there is neither."""
    if told.samples is None:
        try:
            manifest = open_training(config)
        except ValueError as error:
            raise ValueError(f"{error}; or plan without data: --samples 10000000 --image-kb 100 --kind pair") from error
        return _of_manifest(config, manifest, decode_rate)
    images = IMAGES.get(told.kind, config.data.views)
    return DataFacts(
        kind=told.kind,
        num_records=told.samples,
        images_per_record=images,
        rows_per_record=images,
        record_bytes=told.image_kb * 1000 * images,
        units_per_epoch=max(1, told.samples // (config.data.per_class or 1)),
        classes=told.classes or 0,
        target_dim=0,
        remote=True,
        decode_rate=decode_rate or DECODE_RATE,
        measured=False,
    )


def _of_manifest(config: RunConfig, manifest: Manifest, decode_rate: float | None) -> DataFacts:
    remote = any(manifest_part.shard_file(0).remote for manifest_part in parts_of(manifest))
    rate = decode_rate or (None if remote else _measured_rate(config, manifest))
    images = manifest.num_images / manifest.num_samples * config.data.views
    return DataFacts(
        kind=manifest.kind,
        num_records=manifest.num_samples,
        images_per_record=images,
        rows_per_record=max(images, IMAGES.get(manifest.kind, 1)) if manifest.vector_dim else images,
        record_bytes=float(manifest.nbytes.sum()) / manifest.num_samples,
        units_per_epoch=units_per_epoch(manifest, config.data),
        classes=manifest.num_classes if manifest.kind == "labelled" else 0,
        target_dim=manifest.target_dim,
        remote=remote,
        decode_rate=rate or DECODE_RATE,
        measured=decode_rate is None and rate is not None,
    )


def _measured_rate(config: RunConfig, manifest: Manifest) -> float | None:
    """Images/s that one thread reads, decodes and crops, as a run does it."""
    unit = config.data.per_class or 1
    batch = min(config.data.batch, max(2 * unit, 32 // unit * unit))
    data = config.data.model_copy(
        update={"batch": batch, "threads": 1, "prefetch": 1, "decoded_mb": 0.0, "max_bad_fraction": 1.0}
    )
    with Loader(manifest, data, seed=config.seed) as stream:
        next(stream)
        started, images = time.perf_counter(), 0
        while (spent := time.perf_counter() - started) < DECODE_S and images < 2000:
            images += next(stream).num_images
    return images / spent if images and spent > 0 else None


def encoder_facts(config: RunConfig, name: str | None) -> EncoderFacts:
    """Of the table's `name`; without, of the config's encoder, built here, or of what its name says it is.

    Raises ValueError when it cannot be built here and nothing like it is in the table.
    """
    asked = next(iter(config.encoder.parts().values())).options.get("dim")
    dim = asked if isinstance(asked, int) else None
    precision, size = config.train.precision, config.data.image_size
    checkpointing = any(part.options.get("checkpointing") is True for part in config.encoder.parts().values())
    if name is not None and config.encoder.towers:
        raise ValueError(f"--encoder {name} is one network, but the config has an encoder.anchor and an encoder.positive")
    if name is not None:
        return published(name, size, dim, precision, checkpointing=checkpointing)
    try:
        with allowance(encoder_settings(config)):
            encoder = build_encoder(config.encoder, size)
    except (ValueError, RuntimeError, OSError) as error:
        model = Path(str(config.encoder.options.get("model", ""))).name
        like = next((known for start, known in _LIKE.items() if model.startswith(start)), None)
        if like is None:
            known = ", ".join(MODELS)
            raise ValueError(f"{error}; or plan with one like it: --encoder NAME, of {known}") from error
        return published(like, size, dim, precision, checkpointing=checkpointing)
    parameters = list(encoder.parameters())
    networks = image_networks(encoder)  # of towers the mean: as many images go to one as to the other
    return EncoderFacts(
        name=config.encoder.name,
        parameters=sum(p.numel() for p in parameters),
        learned=sum(p.numel() for p in parameters if p.requires_grad),
        dim=int(encoder.dim),  # type: ignore[arg-type]
        forward_flops=sum(_flops(part, size) for part in networks) / len(networks),
        kept_bytes=sum(saved_bytes(part, size, autocast=DTYPES.get(precision)) for part in networks) // len(networks),
        source="built here",
        buffer_bytes=sum(b.nbytes for b in encoder.buffers()),
        checkpointing=checkpointing,
    )


def _flops(encoder: nn.Module, image_size: int) -> float:
    """Of one image's forward pass, by its shapes alone if the encoder lets us."""
    from torch.utils.flop_counter import FlopCounterMode

    for device in ("meta", "cpu"):
        counter = FlopCounterMode(display=False)
        try:
            there = copy.deepcopy(encoder).to(device).eval()
            with counter, torch.no_grad():
                there(torch.zeros(1, 3, image_size, image_size, device=device))
            return float(counter.get_total_flops())
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            if device == "cpu":
                raise
    raise AssertionError


def loss_facts(config: RunConfig, data: DataFacts, dim: int, *, cpu: bool) -> list[LossFacts]:
    """One for every objective that sends on its own. Raises ValueError for losses that cannot be."""
    groups = torch.arange(data.classes) if data.classes else None
    with allowance("; ".join(given("loss", part) for part in config.loss)):
        objective = build_objective(
            config.loss, dim=dim, groups=groups, counts=None if groups is None else torch.ones_like(groups)
        )
    modules: Sequence[nn.Module] = list(objective.parts.values()) if isinstance(objective, Weighted) else [objective]
    found = []
    for part, module in zip(config.loss, modules, strict=True):
        found += list(_prefixes(config, part, module, data, dim, cpu=cpu))
    return found


def _prefixes(config: RunConfig, part: Part, module: nn.Module, data: DataFacts, dim: int, *, cpu: bool) -> Iterator[LossFacts]:
    dims, inner = (module.dims, module.objective) if isinstance(module, Prefixes) else ((dim,), module)
    assert isinstance(inner, Objective)
    for one in dims:
        yield _loss(config, part, inner, data, one, cpu=cpu)


def _compared(objective: Objective) -> float:
    """Share of all rows times all candidates of two views that the loss compares, over all of its passes."""
    one_sided = objective.queries == "anchors"
    passes = 2 if (isinstance(objective.loss, RowLoss) and objective.loss.symmetric if one_sided else True) else 1
    if objective.candidates == "other_view":
        return 0.25 * passes
    return 0.5 * passes if one_sided else 1.0


def _loss(config: RunConfig, part: Part, objective: Objective, data: DataFacts, dim: int, *, cpu: bool) -> LossFacts:
    loss, size = objective.loss, 8 if config.train.precision == "fp64" else 4
    target = isinstance(loss, Similarities) or objective.guards.ignore_closer_than is not None or config.train.reproducible
    about = LossFacts(
        family="rows",
        dim=dim,
        wire_size=2 if objective.wire == "bf16" and not config.train.reproducible else size,
        memory=0 if objective.memory is None else objective.memory.size,
        parameters=sum(p.numel() for p in loss.parameters() if p.requires_grad),
        target_dim=data.target_dim if target else 0,
        compared=_compared(objective),
        copies=4.0 if objective.candidates == "other_view" else 3.0,  # two passes hold copies of theirs
        chunk_bytes=objective.chunk_bytes or CHUNK_BYTES[cpu],
    )
    if isinstance(loss, Elementwise) or (isinstance(loss, RowLoss) and data.kind == "labelled_pair" and loss.given is not None):
        return replace(about, family="given")
    if isinstance(loss, Similarities):
        return replace(about, family="distill")
    if isinstance(loss, Centres):
        shard = part.options.get("shard", "auto")
        large = loss.num_classes * loss.per_class * loss.dim > SHARD_ABOVE
        sharded = not config.train.reproducible and (large if shard == "auto" else shard is True)
        numbers = 0 if sharded else about.parameters
        return replace(
            about,
            family="softmax" if isinstance(loss, SoftmaxHead) else "centres",
            parameters=numbers,
            classes=loss.num_classes,
            per_class=loss.per_class,
            sharded=sharded,
        )
    return about
