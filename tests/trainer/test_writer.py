"""Checkpoints are written while training goes on, and nothing that goes wrong meanwhile stays hidden."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from configs.errors import Unrecoverable
from tests.small_disk import small_disk
from trainer import checkpoints
from trainer.checkpoints import About, Snapshot
from trainer.writer import HostCopy, Writer

ROOT = Path(__file__).parents[2]


def snapshot(value: float = 0.0, size: int = 4) -> Snapshot:
    weights = {"weight": torch.full((size,), value)}
    return Snapshot(
        {"encoder": weights}, {"state": {0: {"step": torch.tensor(value)}}, "param_groups": [{"betas": (0.9, 0.99)}]}, {}
    )


def about(step: int) -> About:
    return About(step, step, {})


def to(folder: Path) -> Callable[[Snapshot, About], None]:
    return lambda taken, told: checkpoints.save(folder, taken, told, keep=9)


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits() -> None:
    go, order = threading.Event(), []

    def write(taken: Snapshot, told: About) -> None:
        assert go.wait(10)
        order.append(f"written {told.step}")

    with Writer(write) as writer:
        writer.submit(snapshot(), about(1))
        order.append("trained on")
        threading.Timer(0.2, go.set).start()
        writer.submit(snapshot(), about(2))
        order.append("submitted 2")
    assert order[:2] == ["trained on", "written 1"]
    assert sorted(order[2:]) == ["submitted 2", "written 2"]


def test_what_is_written_is_what_was_there_when_it_was_taken(tmp_path: Path) -> None:
    go = threading.Event()
    found: list[tuple[float, float, object]] = []

    def write(taken: Snapshot, told: About) -> None:
        assert go.wait(10)
        weight, moments = taken.modules["encoder"]["weight"], taken.optimizer["state"][0]["step"]
        found.append((float(weight.sum()), float(moments), taken.optimizer["param_groups"]))

    live = snapshot(1.0)
    with Writer(write) as writer:
        for value in (1.0, 2.0):
            live.modules["encoder"]["weight"].fill_(value)
            live.optimizer["state"][0]["step"].fill_(value)
            go.clear()
            writer.submit(live, about(int(value)))
            live.modules["encoder"]["weight"].fill_(-1)  # the next step of training
            live.optimizer["state"][0]["step"].fill_(-1)
            go.set()
    assert found == [(4.0, 1.0, [{"betas": (0.9, 0.99)}]), (8.0, 2.0, [{"betas": (0.9, 0.99)}])]


def test_weights_are_copied_row_by_row_as_files_hold_them_and_moments_as_they_lie() -> None:
    lying = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)
    copied = HostCopy()(Snapshot({"encoder": {"weight": lying}}, {"state": {0: {"exp_avg": lying}}}, {}))
    weight, moment = copied.modules["encoder"]["weight"], copied.optimizer["state"][0]["exp_avg"]
    assert torch.equal(weight, lying)
    assert torch.equal(moment, lying)
    assert weight.is_contiguous()
    assert moment.stride() == lying.stride()


def stop(writer: Writer, taken: Snapshot) -> None:
    with writer:
        writer.submit(taken, about(1))
        raise KeyboardInterrupt


def test_a_tensor_that_grew_is_copied_whole(tmp_path: Path) -> None:
    with Writer(to(tmp_path)) as writer:
        for step, size in enumerate([2, 5, 3], start=1):
            writer.submit(snapshot(float(step), size), about(step))
    from safetensors.torch import load_file

    sizes = [len(load_file(tmp_path / f"step-0000000{step}" / "encoder.safetensors")["weight"]) for step in (1, 2, 3)]
    assert sizes == [2, 5, 3]


def fail(taken: Snapshot, told: About) -> None:
    raise RuntimeError(f"cannot write step {told.step}")


def test_an_error_surfaces_at_the_next_save_once() -> None:
    with Writer(fail) as writer:
        writer.submit(snapshot(), about(1))
        with pytest.raises(RuntimeError, match="cannot write step 1"):
            writer.submit(snapshot(), about(2))
        writer.wait()


def test_an_error_of_the_last_write_surfaces_at_the_end() -> None:
    with pytest.raises(RuntimeError, match="cannot write step 1"), Writer(fail) as writer:
        writer.submit(snapshot(), about(1))


def test_what_ends_the_training_is_not_hidden_by_an_error_of_the_writer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        stop(Writer(fail), snapshot())
    assert "cannot write step 1" in caplog.text


def test_a_run_that_stops_waits_for_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop(Writer(to(tmp_path)), snapshot(size=3_000_000))
    saved = checkpoints.newest(tmp_path)
    assert saved is not None
    assert saved.step == 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kib=1024) as folder:
        yield folder


@pytest.mark.parametrize("large", ["modules", "optimizer"])
def test_a_full_disk_stops_with_one_message_and_the_checkpoint_before_still_loads(disk: Path, large: str) -> None:
    checkpoints.save(disk, snapshot(1.0), about(1), keep=9)
    big = {"weight": torch.zeros(400_000)}
    taken = Snapshot({"encoder": big}, {}, {}) if large == "modules" else Snapshot({}, {"state": {0: big}}, {})
    where = f"{disk}/step-00000002"
    with pytest.raises(Unrecoverable, match=f"cannot write the checkpoint {where}: No space left on device; free some space"):
        checkpoints.save(disk, taken, about(2), keep=1)
    saved = checkpoints.newest(disk)
    assert saved is not None
    assert saved.step == 1
    assert [path.name for path in disk.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_while_files_are_flushed_is_a_full_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(Unrecoverable, match="free some space"):
        checkpoints.save(tmp_path, snapshot(), about(1), keep=1)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RuntimeError, match=r"cannot write the checkpoint .*file/checkpoints/step-00000001: Not a directory"):
        checkpoints.save(tmp_path / "file" / "checkpoints", snapshot(), about(1), keep=1)


WRITES = """
import sys, torch
from pathlib import Path
from trainer import checkpoints
from trainer.checkpoints import About, Snapshot
from trainer.writer import Writer

folder = Path(sys.argv[1])
with Writer(lambda taken, told: checkpoints.save(folder, taken, told, keep=2)) as writer:
    for step in range(1, 10_000):
        weights = {"weight": torch.full((500_000,), float(step))}
        writer.submit(Snapshot({"encoder": weights}, {"state": {}}, {}), About(step, step, {}))
"""


def test_a_kill_in_the_middle_of_a_save_leaves_one_to_go_on_from(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    last, caught = 0, 0
    for delay_s in (0.0, 0.003, 0.01):
        process = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("step-*"))) < 2 or not list(tmp_path.glob(".step-*")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        caught += len(list(tmp_path.glob(".step-*")))
        saved = checkpoints.newest(tmp_path)
        assert saved is not None
        last = max(last, saved.step)
        with saved.store.fetched(saved.name, "encoder.safetensors") as path:
            assert load_file(path)["weight"].unique().tolist() == [float(saved.step)]
        saved.store.collect()
        assert not list(tmp_path.glob(".*"))
        for path in tmp_path.glob("step-*"):
            saved.store.remove(path.name)
    assert caught > 0, "no kill came in the middle"
    assert last > 1
