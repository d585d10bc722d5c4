"""Metrics reach their file in order, and no step waits for it."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.journal import Journal
from cluster.runfolder import MetricsFile, read_lines
from cluster.saving import Saving
from cluster.system import System
from configs.schema import Optim, RunConfig
from trainer import checkpoints, state
from trainer.optim import Average, build_optimizer
from trainer.stores import open_store


def saving(folder: Path, metrics: Path) -> Saving:
    config = RunConfig.model_validate({"name": "x", "data": {"train": "x"}, "train": {"steps": 9}})
    encoder = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(Optim(), [encoder])
    training = state.Training(encoder, Average(encoder, 0), torch.nn.Linear(1, 1), optimizer)
    return Saving(config, training, open_store(folder / "checkpoints"), MetricsFile(metrics), [], hashes=folder / "hashes")


def test_every_row_has_the_machines_numbers_and_the_time_of_the_log_before(tmp_path: Path) -> None:
    with saving(tmp_path, tmp_path / "metrics.jsonl") as hooks:
        for step in range(3):
            hooks.log(step, {"train/loss": 1.0})
    rows = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["system/process_cpu_percentage"] >= 0 for row in rows)
    assert ["train/log_s" in row for row in rows] == [False, True, True]
    assert all(row["train/log_s"] > 0 for row in rows[1:])


def test_a_disk_that_does_not_answer_holds_up_no_step(tmp_path: Path) -> None:
    journal = Journal(MetricsFile(tmp_path / "metrics.jsonl"), System(torch.device("cpu")))
    os.mkfifo(tmp_path / "metrics.jsonl")  # to open it waits for a reader
    for step in range(5):
        journal.put(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open() as reader:
        rows = []
        while len(rows) < 5:
            rows += [json.loads(line) for line in reader]  # the writer opens it anew for every row
    journal.flush()
    assert [(row["step"], row["train/loss"]) for row in rows] == [(step, float(step)) for step in range(5)]
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


def test_no_checkpoint_is_ahead_of_the_metrics(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with saving(tmp_path, metrics) as hooks:
        for step in range(1, 4):
            hooks.log(step, {"train/loss": 1.0})
            hooks.save(step, step)
            assert len(list(read_lines(metrics))) == step
    saved = checkpoints.newest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.step == 3


def test_a_row_that_cannot_be_written_is_told_at_the_next_checkpoint_and_none_follows_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    journal = Journal(MetricsFile(folder / "metrics.jsonl"), System(torch.device("cpu")))
    folder.rmdir()
    journal.put(1, {"train/loss": 1.0})
    with pytest.raises(FileNotFoundError):
        journal.flush()
    folder.mkdir()
    journal.put(2, {"train/loss": 1.0})
    with pytest.raises(FileNotFoundError):
        journal.flush()
    assert list(folder.iterdir()) == []


def test_what_was_logged_before_an_error_is_written(tmp_path: Path) -> None:
    def fail_after_a_row() -> None:
        with saving(tmp_path, tmp_path / "metrics.jsonl") as hooks:
            hooks.log(1, {"train/loss": 1.0})
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail_after_a_row()
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1]


def test_a_line_that_is_written_while_it_is_read_is_left_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    pieces = [b'{"step": 0}\n{"st', b"", b'ep": 1}\n']  # the end of the file moves after it was met

    class Growing(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, room: Any) -> int:
            piece = pieces.pop(0) if pieces else b""
            room[: len(piece)] = piece
            return len(piece)

    monkeypatch.setattr(Path, "open", lambda *_: io.BufferedReader(Growing()))
    assert list(read_lines(tmp_path / "metrics.jsonl")) == [{"step": 0}]
