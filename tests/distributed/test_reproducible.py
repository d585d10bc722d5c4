"""`train.reproducible`: the loss of every step and the final weights, bit for bit, on any number of real gloo ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import Unrecoverable
from configs.evaluation import expand
from configs.schema import Encoder, RunConfig
from pipelines.batch import NUM_DRAWS, Batch
from tests.ranks import run_ranks
from trainer import checkpoints, collectives, neighbours, reproducible, state
from trainer.backward import backward
from trainer.checkpoints import About
from trainer.encoders import build_encoder
from trainer.evaluate import embed, gather
from trainer.loop import Hooks, fit
from trainer.measurement import measure
from trainer.objective import build_objective
from trainer.optim import Average, build_optimizer

STEPS, HALF, CLASSES = 20, 10, 6
ENCODER = {"name": "convnet", "dim": 12, "patch": 2, "widths": [8], "blocks": 1, "grid": 3, "dropout": 0.2}


@dataclass(frozen=True)
class Case:
    """`rows`: images of a record; `records` of them a step."""

    loss: Any
    rows: int
    records: int
    micro_batch: int
    train: dict[str, Any]
    matching: bool = False


CASES = {
    "a learned temperature, memory, momentum encoder, averaged weights": Case(
        [
            {"name": "info_nce", "learnable": True, "memory": 60, "memory_start": 3},
            {"name": "triplet", "miner": "semi_hard_within_margin", "pick": "random", "weight": 0.5},
        ],
        *(2, 23, 3),  # 8 pieces, the last of 2 records
        {"momentum": 0.9, "ema": 0.9},
    ),
    "semi-hard triplets": Case({"name": "triplet", "miner": "semi_hard", "normalize": False}, 1, 40, 8, {}),
    "sup_con in bf16": Case({"name": "sup_con"}, 1, 40, 4, {"precision": "bf16"}),
    "class centres": Case({"name": "arcface", "sub_centers": 2, "scale": 16.0}, 1, 35, 5, {}),
    "given pairs": Case({"name": "contrastive", "margin": 0.9}, 2, 20, 4, {}, matching=True),
}
Curve = list[tuple[float, float]]


class Stream:
    """Batches made up from their number, cut between the ranks where pieces end."""

    def __init__(self, case: Case, start: int) -> None:
        self.case, self.position, self.counts = case, start, {"wait_s": 0.0}

    def __next__(self) -> Batch:
        self.position += 1
        case, rank, world = self.case, collectives.rank(), collectives.world()
        whole, num_pieces = batch_of(case, self.position), -(-case.records // case.micro_batch)
        first, last = (min(case.records, case.micro_batch * (num_pieces * r // world)) for r in (rank, rank + 1))
        rows, records = slice(first * case.rows, last * case.rows), slice(first, last)
        own = {name: getattr(whole, name)[rows] for name in ("images", "group", "uid", "view", "valid", "draws")}
        match = None if whole.match is None else whole.match[records]
        return Batch(**own, record=whole.record[rows] - first, sample=whole.sample[records], match=match)


def batch_of(case: Case, number: int) -> Batch:
    """Noise on each class's pattern; some rows are not valid, some records do not match."""
    generator = torch.Generator().manual_seed(number)
    n = case.records * case.rows
    record, view = torch.arange(n) // case.rows, torch.arange(n) % case.rows
    group = torch.randint(CLASSES, (case.records,), generator=generator)[record]
    patterns = torch.randint(0, 256, (CLASSES, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    noise = torch.randint(0, 256, (n, 3, 8, 8), generator=generator)
    return Batch(
        images=((patterns[group] + noise) // 2).to(torch.uint8),
        group=group,
        uid=torch.randint(2**40, (n,), generator=generator),
        view=view,
        record=record,
        valid=torch.rand(case.records, generator=generator)[record] > 0.1,
        draws=torch.zeros(n, NUM_DRAWS),
        sample=torch.zeros(case.records, 3, dtype=torch.int64),
        match=torch.randint(2, (case.records,), generator=generator) if case.matching else None,
    )


def config_of(case: Case) -> RunConfig:
    data = {"train": "nowhere", "image_size": 8, "batch": case.records}
    train = {
        "steps": STEPS,
        "log_every": 1,
        "checkpoint_every": HALF,
        "reproducible": True,
        "micro_batch": case.micro_batch,
        **case.train,
    }
    optim = {"lr": 1e-2, "warmup_steps": 2, "clip_norm": 0.5}
    config: dict[str, Any] = {"name": "x", "data": data, "encoder": ENCODER, "loss": case.loss, "optim": optim, "train": train}
    return RunConfig.model_validate({**config, "cluster": {"workers": 1}})


def training_of(config: RunConfig) -> state.Training:
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.encoder, 8)
    with collectives.alone():
        loss = list(config.loss) if len(config.loss) > 1 else config.loss[0]
        objective = build_objective(loss, dim=12, groups=torch.arange(CLASSES), counts=torch.ones(CLASSES).long())
    average, momentum = Average(encoder, config.train.ema), config.train.momentum
    keys = Average(encoder, momentum) if momentum else None
    return state.Training(encoder, average, objective, build_optimizer(config.optim, [encoder, objective]), keys)


def prepare(batch: Batch) -> Tensor:
    return batch.images.float() / 255


def train(case: Case, folder: Path, start: int) -> tuple[Curve, str]:
    """Loss and gradient norm of every step from `start` on, and the hash of the final weights; keeps step 10 in `folder`."""
    torch.set_num_threads(1 + collectives.rank() % 3)
    config = config_of(case)
    curve: Curve = []
    with reproducible.kernels():
        training = training_of(config)
        if start > 0:
            state.restore(checkpoints.read(folder, f"step-{start:08d}"), training)

        def log(step: int, values: dict[str, float]) -> None:
            curve.append((values["train/loss"], values["train/grad_norm"]))

        def save(step: int, position: int) -> None:
            taken = state.snapshot(training)
            if step == HALF and collectives.world() == 1:
                checkpoints.save(folder, taken, About(step, position, {}), keep=1)

        hooks = Hooks(prepare=prepare, evaluate=None, log=log, save=save)
        fit(config, training, Stream(case, start), hooks, start=start, steps=STEPS)
        return curve, reproducible.hash_of(state.snapshot(training).modules)


def every_case(folder: Path, start: int = 0, names: Sequence[str] = tuple(CASES)) -> dict[str, tuple[Curve, str]]:
    return {name: train(CASES[name], folder / name[:7], start) for name in names}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Curve, str]]]:
    """What one process computes, and where it left the checkpoints of step 10."""
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    found = every_case(folder)
    torch.set_num_threads(threads)
    return folder, found


@pytest.mark.parametrize(("world", "names"), [(2, list(CASES)), (5, ["class centres", "given pairs"])])
def test_every_loss_and_the_weights_are_those_of_one_process_bit_for_bit(world: int, names: list[str], alone: Any) -> None:
    folder, expected = alone
    assert all(len(curve) == STEPS and curve[0] != curve[-1] for curve, _ in expected.values())
    assert run_ranks(world, every_case, folder, 0, names) == [{name: expected[name] for name in names}] * world


def test_a_run_resumed_with_another_number_of_ranks_ends_with_the_same_bits(alone: Any) -> None:
    folder, expected = alone
    names = [next(iter(CASES)), "given pairs"]
    rest = {name: (expected[name][0][HALF:], expected[name][1]) for name in names}
    assert run_ranks(3, every_case, folder, HALF, names) == [rest] * 3


def evaluated() -> tuple[dict[str, Any], str]:
    """Metrics of 83 images in batches of 8, searched 16 at a time; and what ranks with different weights are told."""
    neighbours.ROWS = 16
    torch.manual_seed(0)
    encoder, world, rank = build_encoder(Encoder.model_validate(ENCODER), 8), collectives.world(), collectives.rank()
    whole = batch_of(Case(None, 1, 8 * 12, 8, {}), 1)
    real = torch.arange(8 * 12) < 83
    own = []
    for start in range(8 * rank, 8 * 12, 8 * world):
        part = slice(start, start + 8)
        rows = {name: getattr(whole, name)[part] for name in ("images", "group", "uid", "view", "draws")}
        sample = torch.stack([torch.zeros(8), torch.zeros(8), torch.arange(start, start + 8)], 1).long()
        own.append(Batch(**rows, valid=real[part], record=torch.arange(8), sample=sample))
    with reproducible.kernels():
        found = measure(gather(embed(encoder, own, prepare)), expand(("all", "clustering")), resamples=50)
    try:
        reproducible.refuse_unequal("0123456789abcde" + str(rank), 7, torch.device("cpu"))
    except Unrecoverable as error:
        return asdict(found), str(error)
    return asdict(found), ""


def test_evaluation_has_the_same_bits_and_different_weights_are_noticed() -> None:
    rows = neighbours.ROWS
    alone, nothing = evaluated()
    neighbours.ROWS = rows
    assert nothing == ""
    assert 0 < alone["values"]["map_at_r"] < 1
    assert len(alone["values"]) == 23
    assert len(alone["intervals"]) == 7
    for found, error in run_ranks(2, evaluated):
        assert found == alone
        assert "step 7" in error
        assert "worker 1 differs" in error


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_are_those_of_the_ordinary_mode_but_for_rounding(name: str) -> None:
    case = CASES[name]
    config = config_of(case)
    batch, autocast = batch_of(case, 1), torch.bfloat16 if case.train.get("precision") == "bf16" else None
    found: list[tuple[float, list[Tensor]]] = []
    for ordinary in (True, False):
        training = training_of(config)
        without_dropout(training.encoder)
        if ordinary:
            loss, _ = backward(training.encoder, training.objective, prepare(batch), batch, autocast=autocast, step=1)
        else:
            pieces = [len(rows) for rows in torch.split(batch.images, case.micro_batch * case.rows)]
            parts = reproducible.prepared(batch, pieces, prepare)
            step = reproducible.Step(1, 0, autocast)
            loss, _ = reproducible.backward(training.encoder, training.objective, parts, batch, step, keys=None)
        parameters = itertools.chain(training.encoder.parameters(), training.objective.parameters())
        found.append((float(loss), [p.grad for p in parameters if p.grad is not None]))
    exact = autocast is None
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5 if exact else 1e-2)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3 if exact else 0.1, atol=1e-5 if exact else 2e-2)


def without_dropout(encoder: nn.Module) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
