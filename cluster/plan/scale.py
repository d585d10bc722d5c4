"""One number of GPUs: memory, traffic, time and reading of a step, and what they make of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.plan.facts import DataFacts
from cluster.plan.gpus import Gpu, flops_per_second
from cluster.plan.memory import MOMENTS, Holding, Memory, largest_piece, memory
from cluster.plan.models import EncoderFacts
from cluster.plan.reading import Reading, amplification, pool_bytes
from cluster.plan.wire import Call, Links, LossFacts, Share, Step, as_gloo, calls, centre_calls, seconds, sent
from configs.schema import RunConfig

LOSS_FACTOR, PRODUCT_SHARE = 1.7, 0.7  # a row loss over its three matrix products; what these reach of fp32's peak
COLOURS = ("hue", "color", "grayscale", "blur", "rotate", "scale", "shift")


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What nobody can know from a config. `storage_bytes_s` and `cores_per_gpu`: no limit where None."""

    gpu: Gpu
    links: Links
    mfu: float
    storage_bytes_s: float | None = None
    cores_per_gpu: float | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a step. `hidden`: of the gradients' all-reduce, behind the last backward pass."""

    encoder: float
    loss: float
    links: float
    hidden: float
    storage: float
    decoding: float

    @property
    def waiting(self) -> float:
        """For links."""
        return self.links - self.hidden

    @property
    def step(self) -> float:
        return max(self.encoder + self.loss + self.waiting, self.storage, self.decoding)


@dataclass(frozen=True, slots=True)
class Scale:
    """A plan for `world` GPUs. `micro_batch`: records encoded at once; None: not even one fits."""

    world: int
    nodes: int
    share: Share
    micro_batch: int | None
    asked: bool  # whether that is what the config says
    memory: Memory
    have_bytes: float
    sent: dict[str, float]  # bytes of a rank and a step
    times: Times
    images_per_s: float
    amplification: float
    read_bytes_s: float  # of all nodes
    requests_s: float
    pool_bytes: float
    decode_cores: float  # of a GPU


@dataclass(frozen=True, slots=True)
class Facts:
    """What is the same on any number of GPUs."""

    config: RunConfig
    data: DataFacts
    encoder: EncoderFacts
    losses: Sequence[LossFacts]


def plan_for(world: int, facts: Facts, given: Assumptions) -> Scale:
    """Raises ValueError when the batch cannot be shared by so many."""
    config, data = facts.config, facts.data
    share = share_of(config, data, world)
    nodes = math.ceil(world / given.links.gpus_per_node)
    held = _holding(facts, given)
    held = replace(held, losses=[_own_classes(loss, world) for loss in facts.losses])
    have, unit = given.gpu.memory_gb * 1e9, config.data.per_class or 1
    if held.cpu:
        have /= min(world, given.links.gpus_per_node)  # ranks of a machine share it
    candidates = world * share.rows
    piece, per_record = min(share.records, config.train.micro_batch or share.records), data.images_per_record
    at_once = memory(held, share, candidates, math.ceil(piece * per_record))
    asked = at_once.total <= have
    fitting = piece if asked else largest_piece(held, share, candidates, have, unit=unit, images=math.ceil(per_record))
    used = fitting or unit
    if not asked:
        at_once = memory(held, share, candidates, math.ceil(used * per_record))
    step = step_of(facts, share)
    traffic = traffic_of(step, facts.losses, world)
    if given.gpu.name == "cpu":
        traffic = as_gloo(traffic, world)
    reading = Reading(data.num_records, data.record_bytes, config.data.block_mb * 2**20, config.data.lanes, config.data.window)
    amplified = amplification(reading, nodes) if data.remote else 1.0
    per_step = config.data.batch * data.record_bytes * amplified
    times = Times(
        *_computing(facts, given, share, candidates, used),
        links=sum(seconds(call, world, given.links) for call in traffic),
        hidden=_hidden(facts, given, traffic, math.ceil(used * per_record), world),
        storage=0.0 if given.storage_bytes_s is None else per_step / given.storage_bytes_s,
        decoding=0.0 if given.cores_per_gpu is None else share.images / (data.decode_rate * given.cores_per_gpu),
    )
    images_per_s = config.data.batch * per_record / times.step
    sums: dict[str, float] = {}
    for call in traffic:
        sums[call.what] = sums.get(call.what, 0.0) + sent(call, world)
    read = per_step / times.step
    return Scale(
        world=world,
        nodes=nodes,
        share=share,
        micro_batch=fitting,
        asked=asked,
        memory=at_once,
        have_bytes=have,
        sent=sums,
        times=times,
        images_per_s=images_per_s,
        amplification=amplified,
        read_bytes_s=read,
        requests_s=read / reading.block_bytes if data.remote else images_per_s,
        pool_bytes=pool_bytes(reading, nodes) if data.remote else 0.0,
        decode_cores=images_per_s / world / data.decode_rate,
    )


def share_of(config: RunConfig, data: DataFacts, world: int) -> Share:
    """The largest share of a batch that one of `world` ranks has; records are images for labelled data."""
    unit = config.data.per_class or 1
    piece = max(1, config.train.piece // unit)
    units = config.data.batch // unit
    pieces = math.ceil(units / piece)
    if world > pieces:
        what = "units" if piece == 1 else f"pieces of train.micro_batch {config.train.piece}"
        raise ValueError(f"--world {world}: a batch of {config.data.batch} has {pieces} {what} to share; raise data.batch")
    records = min(units, math.ceil(pieces / world) * piece) * unit
    return Share(records, math.ceil(records * data.rows_per_record), math.ceil(records * data.images_per_record))


def step_of(facts: Facts, share: Share) -> Step:
    """What a rank with this share sends."""
    config = facts.config
    return Step(
        share=share,
        losses=facts.losses,
        learned=facts.encoder.learned,
        size=8 if config.train.precision == "fp64" else 4,
        buffer_bytes=facts.encoder.buffer_bytes,
        reproducible=config.train.reproducible,
        keys=config.train.momentum > 0,
        match=facts.data.kind == "labelled_pair",
    )


def traffic_of(step: Step, losses: Sequence[LossFacts], world: int) -> list[Call]:
    """All calls of a step on `world` ranks; none with one."""
    if world == 1:
        return []
    more = [] if step.reproducible else [call for loss in losses for call in centre_calls(step, loss, world)]
    return [*calls(step), *more]


def _own_classes(loss: LossFacts, world: int) -> LossFacts:
    if not loss.sharded:
        return loss
    classes = math.ceil(loss.classes / world)
    return replace(loss, classes=classes, parameters=classes * loss.per_class * loss.dim)


def _holding(facts: Facts, given: Assumptions) -> Holding:
    config = facts.config
    augment = config.data.augment.model_dump()
    return Holding(
        encoder=facts.encoder,
        losses=facts.losses,
        pixels=3 * config.data.image_size**2,
        moments=MOMENTS.get(config.optim.name, 2),
        averages=(config.train.ema > 0) + (config.train.momentum > 0),
        size=8 if config.train.precision == "fp64" else 4,
        autocast=config.train.precision in ("bf16", "fp16"),
        reproducible=config.train.reproducible,
        augments=any(augment[name] for name in COLOURS),
        cpu=given.gpu.name == "cpu",
        prefetch=config.data.prefetch,
        decoded_bytes=round(config.data.decoded_mb * 2**20),
    )


def _computing(facts: Facts, given: Assumptions, share: Share, candidates: int, used: int) -> tuple[float, float]:
    """Seconds of the encoder, backward counted as two forward passes, and of the losses' products, which are in fp32."""
    train = facts.config.train
    passes = 3 + (used < share.records or train.reproducible) + (train.momentum > 0) + facts.encoder.checkpointing
    encoder = share.images * facts.encoder.forward_flops * passes / (flops_per_second(given.gpu, train.precision) * given.mfu)
    rows = candidates if train.reproducible else share.rows
    flops = sum(6.0 * rows * _columns(loss, candidates) * loss.dim for loss in facts.losses)
    return encoder, LOSS_FACTOR * flops / (1e12 * given.gpu.fp32_tflops * PRODUCT_SHARE)


def _columns(loss: LossFacts, candidates: int) -> float:
    if loss.family == "given":
        return 0.0
    return loss.classes * loss.per_class if loss.classes else loss.compared * (candidates + loss.memory)


def _hidden(facts: Facts, given: Assumptions, traffic: Sequence[Call], images: int, world: int) -> float:
    """DDP sends gradients while the last piece is differentiated; the reproducible mode sends them afterwards."""
    train = facts.config.train
    if train.reproducible:
        return 0.0
    backward = 2 * images * facts.encoder.forward_flops / (flops_per_second(given.gpu, train.precision) * given.mfu)
    return min(backward, sum(seconds(call, world, given.links) for call in traffic if call.what == "gradients"))
