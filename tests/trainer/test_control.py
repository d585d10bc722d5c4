"""Steps left out, loss scaling, the early stop: alike on every rank, and remembered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import Unrecoverable
from configs.load import parse_config
from configs.schema import EarlyStop, RunConfig, Train
from pipelines.batch import Batch
from tests.ranks import run_ranks
from tests.trainer.test_backward import Small, batch_of
from trainer import collectives
from trainer.control import FIRST_SCALE, GROW_EVERY, Control
from trainer.loop import Hooks, fit
from trainer.objective import build_objective
from trainer.optim import Average, build_optimizer
from trainer.state import Training

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def config_of(**train: Any) -> RunConfig:
    settings = {"steps": 6, "log_every": 1, "checkpoint_every": 100, "evaluate_every": 1, **train}
    return parse_config({"name": "a", "data": {"train": "x", "eval": "y"}, "train": settings, "cluster": {"workers": 1}})


class Same:
    """The same batch again and again; a rank gets its share."""

    def __init__(self) -> None:
        whole, rank, world = batch_of(24, 2), collectives.rank(), collectives.world()
        start, end = 24 * rank // world, 24 * (rank + 1) // world
        rows = {name: getattr(whole, name)[start:end] for name in ("images", "group", "uid", "view", "valid", "draws")}
        record = whole.record[start:end] - whole.record[start]
        self.batch = replace(whole, **rows, record=record, sample=whole.sample[start // 2 : end // 2])
        self.position, self.counts = 0, {"wait_s": 0.0}

    def __next__(self) -> Batch:
        self.position += 1
        return self.batch


def trained(spoiled: tuple[int, ...], values: Iterator[float] | None = None, **train: Any) -> dict[str, Any]:
    """Train; the second half of the images, which the second of two ranks has, are no numbers at the steps `spoiled`."""
    torch.manual_seed(0)
    config, encoder, stream = config_of(**train), Small().double(), Same()
    objective = build_objective({"name": "info_nce", "learnable": True, "memory": 40}).double()
    optimizer = build_optimizer(config.optim, [encoder, objective])
    training = Training(encoder, Average(encoder, 0.9), objective, optimizer, control=Control(config.train))
    log: dict[int, dict[str, float]] = {}
    saved: list[int] = []

    def prepare(batch: Batch) -> Tensor:
        images = batch.images.double() / 255
        if stream.position in spoiled:
            images[12 if collectives.world() == 1 else 12 * (1 - collectives.rank()) :] = BAD
        return images

    def evaluate(encoder: nn.Module, at_end: bool) -> dict[str, float]:
        if at_end and training.control.ended:  # once more, with the metrics of the end
            return {"val/mrr": 1.0}
        return {"val/recall_at_1": next(values) if values is not None else 0.0}

    hooks = Hooks(prepare, evaluate, log.__setitem__, lambda step, position: saved.append(step))
    fit(config, training, stream, hooks, start=0, steps=config.train.steps or 0)
    weights = torch.cat([p.detach().flatten() for p in [*encoder.parameters(), *training.average.module.parameters()]])
    return {"log": log, "saved": saved, "weights": weights, "control": training.control.state_dict()}


def test_a_spoiled_step_is_left_out_and_the_run_goes_on() -> None:
    found = trained((3,), max_skipped=1)
    assert found["weights"].isfinite().all()
    assert [row["train/skipped"] for step, row in found["log"].items() if step] == [0, 0, 1, 1, 1, 1]
    assert [step for step, row in found["log"].items() if "train/loss" not in row] == [0, 3]
    assert not torch.equal(found["weights"], trained((3, 4, 5, 6), max_skipped=4)["weights"])


@pytest.mark.parametrize(("spoiled", "allowed"), [((3,), 0), ((2, 5), 1)])
def test_one_spoiled_step_too_many_ends_the_run(spoiled: tuple[int, ...], allowed: int) -> None:
    with pytest.raises(Unrecoverable, match=rf"step {spoiled[-1]}: loss nan.*train\.max_skipped"):
        trained(spoiled, max_skipped=allowed)


def spoiled_elsewhere() -> dict[str, Any]:
    found = trained((2,), max_skipped=1)
    control = Control(config_of(max_skipped=3).train)
    one_sided = control.accept(1, GOOD, BAD if collectives.rank() == 1 else GOOD, look=False)
    return {**found, "one_sided": one_sided}


def test_all_ranks_leave_out_what_one_of_them_must() -> None:
    first, second = run_ranks(2, spoiled_elsewhere)
    assert not first["one_sided"]
    assert not second["one_sided"]
    assert first["control"]["skipped"] == second["control"]["skipped"] == 1
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], trained((2,), max_skipped=1)["weights"], rtol=1e-8, atol=1e-10)


def test_the_loss_scale_halves_after_an_overflow_and_grows_again() -> None:
    control = Control(Train(steps=1, precision="fp16"))
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3 * FIRST_SCALE)
    control.unscale_([parameter])
    assert parameter.grad.tolist() == [3.0, 3.0]
    assert not control.accept(1, GOOD, BAD, look=False)
    assert control.loss_scale == FIRST_SCALE / 2
    resumed = Control(Train(steps=1, precision="fp16"))
    resumed.load_state_dict(control.state_dict())
    assert all(resumed.accept(step, GOOD, GOOD, look=False) for step in range(GROW_EVERY))
    assert resumed.loss_scale == FIRST_SCALE
    with pytest.raises(Unrecoverable):
        resumed.accept(9, BAD, BAD, look=False)  # no scale mends a loss that is no number


def test_scaled_losses_give_the_gradients_of_unscaled_ones() -> None:
    from trainer.backward import backward

    torch.manual_seed(0)
    batch = batch_of(24, 2)
    for pieces in (None, [10, 14]):
        found = []
        for scale in (None, 1024.0):
            torch.manual_seed(1)
            encoder, objective = Small().double(), build_objective({"name": "info_nce", "learnable": True}).double()
            loss, _ = backward(encoder, objective, batch.images.double() / 255, batch, pieces=pieces, scale=scale)
            grads = [p.grad for p in [*encoder.parameters(), *objective.parameters()] if p.grad is not None]
            found.append((loss, [g / (scale or 1.0) for g in grads]))
        assert found[0][0] == found[1][0]
        for one, other in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_the_run_ends_when_evaluations_no_longer_get_better() -> None:
    values = iter([0.0, 0.5, 0.52, 0.6, 0.6, 0.65])  # the first is of the untrained encoder
    found = trained((), values=values, early_stop=EarlyStop(patience=2, min_delta=0.06))
    assert list(found["log"]) == [0, 1, 2, 3, 4, 5]
    assert [step for step, row in found["log"].items() if "val/mrr" in row] == [5]
    assert found["saved"] == [5]
    control = Control(config_of(early_stop=EarlyStop(patience=2)).train)
    control.load_state_dict(found["control"])
    assert control.ended


def test_of_an_error_rate_less_is_better() -> None:
    control = Control(config_of(early_stop=EarlyStop(metric="eer", patience=2)).train)
    for value in (0.5, 0.4, 0.45):
        control.watch({"val/eer": value})
    assert not control.ended
    control.watch({"val/eer": 0.41})
    assert control.ended
