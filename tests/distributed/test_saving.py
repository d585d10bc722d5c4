"""Checkpoints of several ranks: errors reach all of them, generators go on as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Optim, RunConfig
from tests.ranks import run_ranks
from trainer import checkpoints, collectives, random_state, state
from trainer.checkpoints import About
from trainer.optim import Average, build_optimizer


def fresh() -> state.Training:
    torch.manual_seed(0)
    encoder, objective = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)), nn.Linear(1, 1)
    return state.Training(encoder, Average(encoder, 0), objective, build_optimizer(Optim(lr=0.1), [encoder, objective]))


def train(training: state.Training, first: int, last: int) -> None:
    encoder = collectives.data_parallel(training.encoder)
    for step in range(first, last + 1):
        rows = 3 + collectives.rank()  # uneven: the ranks' generators part
        images = torch.randn(rows, 4, generator=torch.Generator().manual_seed(10 * step + collectives.rank()))
        encoder(images).square().sum().backward()
        training.optimizer.step()
        training.optimizer.zero_grad()


def uninterrupted(folder: Path) -> Tensor:
    training = fresh()
    train(training, 1, 3)
    taken = state.snapshot(training)
    if collectives.rank() == 0:
        checkpoints.save(folder, taken, About(3, 3, {}), keep=1)
    train(training, 4, 6)
    return next(training.encoder.parameters()).detach()


def resumed(folder: Path) -> Tensor:
    training = fresh()
    saved = collectives.from_first(lambda: checkpoints.newest(folder))
    assert saved is not None
    torch.manual_seed(99)
    state.restore(saved, training)
    train(training, 4, 6)
    return next(training.encoder.parameters()).detach()


def test_dropout_goes_on_after_a_resume_as_if_nothing_had_happened(tmp_path: Path) -> None:
    expected = run_ranks(2, uninterrupted, tmp_path)
    found = run_ranks(2, resumed, tmp_path)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(found[0], found[1])


def drawn(states: dict[str, Tensor]) -> Tensor:
    random_state.restore(states, torch.device("cpu"))
    return torch.rand(3)


def test_on_more_ranks_than_before_every_rank_has_a_generator() -> None:
    states = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    found = run_ranks(3, drawn, {"cpu": torch.stack(states)})
    expected = [torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 1)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def failing(run: Path) -> list[str]:
    from cluster.runfolder import MetricsFile
    from cluster.saving import Saving
    from trainer.stores import open_store

    config = RunConfig.model_validate({"name": "x", "data": {"train": "x"}, "train": {"steps": 9}})
    training, told = fresh(), []
    metrics = MetricsFile(run / "metrics.jsonl")
    try:
        with Saving(
            config, training, open_store(run / "blocked" / "checkpoints"), metrics, [], hashes=run / "hashes"
        ) as saving:
            saving.save(1, 1)
            told.append("went on")
            saving.save(2, 2)
            told.append("not reached")
    except RuntimeError as error:
        told.append(str(error))
    return told


def test_an_error_of_the_writer_stops_all_ranks_with_the_same_message(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    first, second = run_ranks(2, failing, tmp_path)
    assert first == second
    assert first[0] == "went on"
    assert first[1].startswith(f"cannot write the checkpoint {tmp_path}/blocked/checkpoints/step-00000001: ")
    assert len(first) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: its generator's state is not there without one")
def test_the_generator_of_a_gpu_goes_on_too() -> None:
    device = torch.device("cuda")
    states = random_state.gathered(device)
    expected = torch.rand(3, device=device)
    random_state.restore(states, device)
    assert torch.equal(torch.rand(3, device=device), expected)
