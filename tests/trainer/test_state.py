"""Checkpoints come back bit for bit, and damaged ones are passed over."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from configs.schema import Optim
from trainer import checkpoints, state
from trainer.checkpoints import About, Damaged
from trainer.optim import Average, build_optimizer

FILES = [
    *("encoder.safetensors", "average.safetensors", "objective.safetensors", "random.safetensors", "optimizer.pt"),
    "state.json",
]


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
    about = About(step, step * 10, {"seed": 1}, [{"digest": "abc"}], {"recall_at_1": 0.5})
    checkpoints.save(folder, state.snapshot(source), about, keep=keep)
    return folder / f"step-{step:08d}"


def assert_same(source: state.Training, other: state.Training) -> None:
    for name, module in source.modules().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, other.modules()[name].state_dict()[key]), (name, key)
    before, after = source.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[i][k], after[i][k]) for i in before for k in before[i])


def test_everything_a_step_changes_comes_back(tmp_path: Path) -> None:
    source = training(1)
    save(tmp_path, source, 7)
    expected = torch.randn(5)  # what the generator gives after the checkpoint
    other = training(2)
    saved = checkpoints.newest(tmp_path)
    assert saved is not None
    assert (saved.step, saved.position, saved.identity) == (7, 70, {"seed": 1})
    assert (saved.sources, saved.metric) == ([{"digest": "abc"}], {"recall_at_1": 0.5})
    state.restore(saved, other)
    assert torch.equal(torch.randn(5), expected)
    assert_same(source, other)


def test_moments_take_the_layout_of_their_parameters(tmp_path: Path) -> None:
    def conv(layout: torch.memory_format) -> state.Training:
        torch.manual_seed(5)
        encoder, objective = nn.Conv2d(3, 4, 2).to(memory_format=layout), nn.Linear(1, 1)
        return state.Training(encoder, Average(encoder, 0), objective, build_optimizer(Optim(lr=0.1), [encoder, objective]))

    def step(training: state.Training) -> torch.Tensor:
        training.encoder(torch.arange(48.0).view(1, 3, 4, 4).cos()).pow(3).sum().backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        return next(training.encoder.parameters()).detach()

    source, other = conv(torch.contiguous_format), conv(torch.channels_last)
    step(source)
    save(tmp_path, source, 1)
    saved = checkpoints.newest(tmp_path)
    assert saved is not None
    state.restore(saved, other)
    assert torch.allclose(step(other), step(source), atol=1e-6)


def test_no_file_of_a_checkpoint_is_forgotten_by_these_tests(tmp_path: Path) -> None:
    assert sorted(path.name for path in save(tmp_path, training(1), 1).iterdir()) == sorted(FILES)


def flip(data: bytes, at: int, bits: int = 1) -> bytes:
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut by a byte": lambda data: data[:-1],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
    "first bit": lambda data: flip(data, 0),
    "bit in the middle": lambda data: flip(data, len(data) // 2),
    "last bit": lambda data: flip(data, len(data) - 1),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, training(1), 1)
    file = save(tmp_path, training(1), 2) / name
    data = DAMAGE[damage](file.read_bytes())
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    found = checkpoints.search(tmp_path)
    assert found.saved is not None
    assert found.saved.step == 1
    assert len(found.skipped) == 1
    assert "step-00000002" in found.skipped[0]
    assert name in found.skipped[0]


@pytest.mark.parametrize("name", [name for name in FILES if name != "state.json"])
def test_no_flipped_byte_goes_unseen(tmp_path: Path, name: str) -> None:
    save(tmp_path, training(1), 1)
    file = save(tmp_path, training(1), 2) / name
    data = file.read_bytes()
    for at in {0, len(data) - 1, *random.choices(range(len(data)), k=40)}:
        file.write_bytes(flip(data, at, random.randrange(1, 256)))
        found = checkpoints.newest(tmp_path)
        assert found is not None
        assert found.step == 1, f"byte {at}"


def test_no_flipped_byte_of_the_manifest_changes_what_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, training(1), 1)
    file, good = path / "state.json", checkpoints.read(tmp_path, path.name)
    data, detected = file.read_bytes(), 0
    for at in range(len(data)):
        file.write_bytes(flip(data, at))
        try:
            assert checkpoints.read(tmp_path, path.name) == good, f"byte {at}"
        except Damaged:
            detected += 1
    assert detected > len(data) * 0.8  # the rest is white space


def test_what_a_killed_writer_leaves_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, training(1), 3)
    (tmp_path / ".step-00000004.99").mkdir()
    (tmp_path / ".step-00000004.99" / "encoder.safetensors").write_bytes(b"half")
    saved = checkpoints.newest(tmp_path)
    assert saved is not None
    assert saved.step == 3
    saved.store.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_checkpoint_of_version_1_is_read(tmp_path: Path) -> None:
    source, other = training(1), training(2)
    path = tmp_path / "step-00000004"
    path.mkdir()
    for name, module in source.modules().items():
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path / f"{name}.safetensors")
    torch.save(source.optimizer.state_dict(), path / "optimizer.pt")
    import hashlib

    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
    about = {"version": 1, "step": 4, "position": 40, "identity": {"seed": 1}, "sources": [], "files": files}
    (path / "state.json").write_text(json.dumps(about))
    saved = checkpoints.newest(tmp_path)
    assert saved is not None
    assert (saved.step, saved.position) == (4, 40)
    state.restore(saved, other)
    assert_same(source, other)


def test_a_checkpoint_of_a_later_version_is_refused_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, training(1), 1)
    monkeypatch.setattr(checkpoints, "VERSION", 3)
    save(tmp_path, training(1), 2)
    with pytest.raises(ValueError, match=r"step-00000002 is of version 3.*reads versions 1 and 2.*move it away"):
        checkpoints.search(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save(tmp_path, training(1), 1)
    with pytest.raises(ValueError, match="does not fit"):
        state.load_weights(nn.Linear(3, 3), tmp_path / "step-00000001" / "encoder.safetensors")
