"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from pipelines.batch import Batch
from trainer import collectives, ranges, reproducible
from trainer.agreement import Agreement, Wish
from trainer.backward import backward, encode, pieces_of
from trainer.optim import set_rate
from trainer.schedules import learning_rate
from trainer.sharding import clip_
from trainer.state import Training


class Stream(Protocol):
    """Endless batches; `position` counts what was handed out."""

    @property
    def position(self) -> int: ...

    @property
    def counts(self) -> dict[str, float]:
        """What happened so far on this rank, always the same names; `wait_s` are the seconds spent waiting for batches."""

    def __next__(self) -> Batch: ...


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop needs from the world around it. All but `prepare` are reached by every rank at the same step."""

    prepare: Callable[[Batch], Tensor]  # batch on the device -> float images, augmented
    evaluate: Callable[[nn.Module, bool], dict[str, float]] | None  # (encoder, whether with the metrics of the end)
    log: Callable[[int, dict[str, float]], None]
    save: Callable[[int, int], None]  # (step, position)
    wish: Callable[[], Wish] = lambda: Wish.NONE  # this rank's own, asked for at the same steps on every rank
    beat: Callable[[int], None] = lambda step: None  # a sign of life, each step


def fit(config: RunConfig, training: Training, stream: Stream, hooks: Hooks, *, start: int, steps: int) -> int:
    """Train from step `start` (0: from the beginning) to `steps`; returns the last one done. Collective: every rank calls it.

    Ends earlier where `train.early_stop` says so, and where a rank wishes to stop; the state is saved then too.
    Raises Unrecoverable when the loss or the gradient is no longer finite.
    """
    settings, control = config.train, training.control
    if control.ended:
        return start
    encoder, objective = training.encoder, training.objective
    if not settings.reproducible:
        encoder = collectives.data_parallel(encoder)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision)
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    training.encoder.train()
    if start == 0 and hooks.evaluate is not None:
        hooks.log(0, hooks.evaluate(training.average.module, True))
    meter = _Meter(stream, start, device)
    agreement = Agreement(hooks.wish, start, device)
    for step in range(start + 1, steps + 1):
        rate = learning_rate(config.optim, step, steps)
        set_rate(training.optimizer, rate)
        with ranges.part(ranges.DATA):
            batch = next(stream)
        pieces = pieces_of(batch, settings.micro_batch)  # read on the host, before the batch leaves it
        with ranges.part(ranges.PREPARE):
            batch = batch.pin().to(device) if device.type == "cuda" else batch
        due = [step % every == 0 or step == steps for every in (settings.log_every, settings.evaluate_every)]
        wish = agreement.at(step)
        keep = step % settings.checkpoint_every == 0 or step == steps or wish is not Wish.NONE
        keys = None if training.keys is None else training.keys.module
        if settings.reproducible:
            assert pieces is not None
            with ranges.part(ranges.PREPARE):
                parts = reproducible.prepared(batch, pieces, hooks.prepare)
            about = reproducible.Step(step, config.seed, autocast, with_stats=due[0])
            loss, stats = reproducible.backward(encoder, objective, parts, batch, about, keys=keys)
        else:
            with ranges.part(ranges.PREPARE):
                images = hooks.prepare(batch)
            extra: dict[str, Any] = {"step": step, "with_stats": due[0], "scale": control.loss_scale}
            if keys is not None:
                extra["keys"] = encode(keys, images, pieces, autocast, batch)
            loss, stats = backward(encoder, objective, images, batch, pieces=pieces, autocast=autocast, **extra)
            control.unscale_(parameters)
        with ranges.part(ranges.OPTIMIZER):
            norm = clip_(parameters, objective, config.optim.clip_norm)
            accepted = control.accept(step, loss, norm, look=due[0] or keep)
            if accepted:
                training.update(step)
            training.optimizer.zero_grad(set_to_none=True)
        numbers: dict[str, float] = {}
        if due[0]:
            numbers = {"train/loss": float(loss), "train/lr": rate, "train/grad_norm": float(norm)}
            numbers |= {f"train/{name}": float(value) for name, value in stats.items()}
            if not accepted:
                numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
            numbers |= control.numbers() | meter.read(step, batch.num_images * collectives.world())
        if due[1] and hooks.evaluate is not None:
            numbers |= hooks.evaluate(training.average.module, step == steps)
            control.watch(numbers)
            if control.ended and step < steps:
                numbers |= hooks.evaluate(training.average.module, True)
            meter.restart(step)
        if numbers:
            hooks.log(step, numbers)
        if keep or control.ended:
            hooks.save(step, stream.position)
        hooks.beat(step)
        if control.ended or wish is Wish.STOP:
            return step
    return steps


class _Meter:
    """What happened between two readings."""

    def __init__(self, stream: Stream, start: int, device: torch.device) -> None:
        self.stream, self.device = stream, device
        self.restart(start)

    def restart(self, step: int) -> None:
        self.step, self.time, self.counts = step, time.perf_counter(), self.stream.counts

    def read(self, step: int, images_per_step: int) -> dict[str, float]:
        """Speed, and the loaders' counts over all ranks. Collective: every rank calls it."""
        seconds = max(time.perf_counter() - self.time, 1e-9)
        before, now, steps = self.counts, self.stream.counts, step - self.step
        grown = torch.tensor([now[name] - before[name] for name in now], dtype=torch.float64, device=self.device)
        counts = dict(zip(now, collectives.total(grown).tolist(), strict=True))
        waited = counts.pop("wait_s") / collectives.world()
        self.restart(step)
        speed = {"train/images_per_s": steps * images_per_step / seconds, "train/wait_share": waited / seconds}
        return speed | {f"loader/{name}": number for name, number in counts.items()}
