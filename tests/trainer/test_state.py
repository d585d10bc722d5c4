"""Checkpoints come back bit for bit, and damaged ones are passed over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from configs.schema import Optim
from trainer import state
from trainer.optim import Average, build_optimizer


def training(seed: int, steps: int = 3) -> state.Training:
    torch.manual_seed(seed)
    encoder, objective = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), nn.Linear(2, 1)
    found = state.Training(encoder, Average(encoder, 0.9), objective, build_optimizer(Optim(), [encoder, objective]))
    for step in range(1, steps + 1):
        (encoder(torch.randn(3, 4)).square().sum() + objective(torch.randn(3, 2)).sum()).backward()
        found.optimizer.step()
        found.optimizer.zero_grad()
        found.average.update(step)
    return found


def save(folder: Path, source: state.Training, step: int, keep: int = 9) -> Path:
    return state.save(folder, state.snapshot(source), step=step, position=step * 10, identity={"seed": 1}, keep=keep)


def test_everything_a_step_changes_comes_back(tmp_path: Path) -> None:
    source, other = training(1), training(2)
    save(tmp_path, source, 7)
    saved = state.newest(tmp_path)
    assert saved is not None
    assert (saved.step, saved.position, saved.identity) == (7, 70, {"seed": 1})
    state.restore(saved, other)
    for name, module in source.modules().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, other.modules()[name].state_dict()[key]), (name, key)
    before, after = source.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert all(torch.equal(before[i][k], after[i][k]) for i in before for k in before[i])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, training(step), step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize(
    "name", ["encoder.safetensors", "average.safetensors", "objective.safetensors", "optimizer.pt", "state.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, training(1), 1)
    file = save(tmp_path, training(1), 2) / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[len(data) // 2] ^= 0x40 if name != "state.json" else 0x80  # a flip in JSON must not stay valid JSON by luck
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    saved = state.newest(tmp_path)
    assert saved is not None
    assert saved.step == 1


def test_what_a_killed_writer_leaves_is_no_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, training(1), 3)
    shutil.copytree(path, tmp_path / ".step-00000004.99")
    (tmp_path / ".step-00000004.99" / "state.json").unlink()
    saved = state.newest(tmp_path)
    assert saved is not None
    assert saved.step == 3


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save(tmp_path, training(1), 1)
    with pytest.raises(ValueError, match="does not fit"):
        state.load_weights(nn.Linear(3, 3), tmp_path / "step-00000001" / "encoder.safetensors")
