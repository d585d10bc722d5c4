"""What `train.reproducible` costs: time of a step and bytes between ranks, on two gloo ranks of one thread each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.batch import NUM_DRAWS, Batch
from tests.benchmarks.measure import FULL, MIB, fastest, table
from tests.ranks import run_ranks
from trainer import collectives, reproducible
from trainer.backward import backward, pieces_of
from trainer.encoders.convnet import ConvNet
from trainer.objective import build_objective

pytestmark = pytest.mark.benchmark

WORLD, SIDE, DIM, MICRO = 2, 48, 128, 32
BATCHES = (256, 1024) if FULL else (256,)
SCORED = (1024, 4096)  # rows of the loss alone


def batch_of(size: int) -> Batch:
    """This rank's share of `size` images, two of a class."""
    first, n = size * collectives.rank() // WORLD, size // WORLD
    row = torch.arange(first, first + n)
    return Batch(
        images=torch.randint(0, 256, (n, 3, SIDE, SIDE), dtype=torch.uint8),
        group=row // 2,
        uid=row,
        view=row % 2,
        record=torch.arange(n),
        valid=torch.ones(n, dtype=torch.bool),
        draws=torch.zeros(n, NUM_DRAWS),
        sample=torch.zeros(n, 3, dtype=torch.int64),
    )


def prepare(batch: Batch) -> Tensor:
    return batch.images.float() / 255


def steps(size: int) -> tuple[dict[str, float], int]:
    """Seconds of forward and backward in each mode, and how many numbers the gradient has."""
    torch.manual_seed(0)
    encoder, objective, batch = ConvNet(SIDE, DIM), build_objective({"name": "info_nce", "learnable": True}), batch_of(size)
    parallel = collectives.data_parallel(encoder)
    pieces = pieces_of(batch, MICRO)
    assert pieces is not None

    def ordinary(pieces: list[int] | None) -> None:
        backward(parallel, objective, prepare(batch), batch, pieces=pieces, with_stats=False)

    def equal() -> None:
        parts, step = reproducible.prepared(batch, pieces, prepare), reproducible.Step(1, 0, with_stats=False)
        with reproducible.kernels():
            reproducible.backward(encoder, objective, parts, batch, step, keys=None)

    modes = {"ordinary": lambda: ordinary(None), f"micro_batch {MICRO}": lambda: ordinary(pieces), "reproducible": equal}
    return fastest(modes, 6), sum(p.numel() for p in encoder.parameters())


def scoring(size: int) -> dict[str, float]:
    """Seconds of the loss: shared between ranks, and whole on each."""
    objective, n = build_objective({"name": "info_nce"}), size // WORLD
    mine = torch.randn(n, DIM).requires_grad_()
    group = torch.arange(n) // 2 + n * collectives.rank()

    def shared() -> None:
        objective(mine, group, with_stats=False)[0].backward()

    def whole() -> None:
        sizes = collectives.sizes(n, mine.device)
        every, groups = collectives.gather(mine.detach(), sizes).requires_grad_(), collectives.gather(group, sizes)
        with collectives.alone():
            objective(every, groups, with_stats=False)[0].backward()

    return fastest({"shared": shared, "whole": whole}, 4)


def measured() -> dict[str, Any]:
    return {"steps": {b: steps(b) for b in BATCHES}, "scoring": {b: scoring(b) for b in SCORED}}


def test_time_of_a_step_and_bytes_against_the_ordinary_mode() -> None:
    found = run_ranks(WORLD, measured)[0]
    rows: list[list[object]] = []
    for size, (seconds, numbers) in found["steps"].items():
        for mode, s in seconds.items():
            wire = numbers * (8 if mode == "reproducible" else 4) / MIB
            rows.append([f"{mode}, batch {size}", f"{s * 1e3:.0f} ms", f"{s / seconds['ordinary']:.2f}x", f"{wire:.2f} MiB"])
    for size, seconds in found["scoring"].items():
        for mode, s in seconds.items():
            rows.append([f"loss alone, {mode}, batch {size}", f"{s * 1e3:.0f} ms", f"{s / seconds['shared']:.2f}x", ""])
    title = f"Forward and backward: convnet, {SIDE} px, {WORLD} gloo ranks of 1 thread"
    table(title, ["mode", "step", "against ordinary", "gradient"], rows)
