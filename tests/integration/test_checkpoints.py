"""Runs, without what follows training, whose checkpoints break or lie behind a URL."""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path

import pytest

from cluster import launch
from cluster.job import Job
from cluster.paths import absolute
from cluster.resume import histories_of
from cluster.runfolder import RunFolder, read_lines
from configs.load import load_config
from pipelines.mixture import open_sources
from trainer.stores import Store

FEW = ["train.steps=12", "train.checkpoint_every=4", "train.evaluate_every=100", "cluster.workers=1"]


def train(config_file: Path, name: str, *settings: str) -> Path:
    """The ranks of `nearfar train --resume`, here; the run's folder."""
    config = absolute(load_config(config_file, [*FEW, f"name={name}", *settings]))
    folder, steps = RunFolder.of(config), config.train.steps
    assert steps is not None
    histories = histories_of(config, folder, open_sources(config.data.train, None))
    folder.claim(config)
    launch.run(Job(config, folder.path, steps, histories, uuid.uuid4().hex[:8]), local=True)
    return folder.path


def curve(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in read_lines(run / "metrics.jsonl") if "train/loss" in row]


def test_a_run_with_damaged_checkpoints_goes_on_from_the_one_before(
    config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at = f"cluster.checkpoints=memory://{uuid.uuid4().hex}"
    run = train(config_file, "run", at)
    store = RunFolder(run).checkpoints(RunFolder(run).config())
    expected, weights = curve(run), contents(store, "step-00000012")
    (run / "metrics.jsonl").unlink()  # a step that is there already is not written again
    last, before = dict(weights), contents(store, "step-00000008")
    last["encoder.safetensors"] = bytes([*last["encoder.safetensors"][:-1], last["encoder.safetensors"][-1] ^ 1])
    del before["optimizer.pt"]
    put(store, "step-00000012", last)
    put(store, "step-00000008", before)
    with caplog.at_level(logging.WARNING, logger="cluster"):
        train(config_file, "run", at)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("cluster")]
    assert len(told) == 2
    assert "step-00000012: encoder.safetensors is damaged" in told[0]
    assert "step-00000008: optimizer.pt is missing" in told[1]
    rows = list(read_lines(run / "attempts.jsonl"))
    assert [row["from_step"] for row in rows] == [0, 4]
    assert [len(row["skipped"]) for row in rows] == [0, 2]
    assert curve(run) == [point for point in expected if point[0] > 4]
    assert len(store.names()) == 3
    again = contents(store, "step-00000012")
    assert [name for name in weights if name.endswith("safetensors") and again[name] != weights[name]] == []


def contents(store: Store, name: str) -> dict[str, bytes]:
    with store.fetched(name, "state.json") as path:
        found = {"state.json": path.read_bytes()}
    for file in json.loads(found["state.json"])["files"]:
        with store.fetched(name, file) as path:
            found[file] = path.read_bytes()
    return found


def put(store: Store, name: str, files: dict[str, bytes]) -> None:
    with store.publish(name) as folder:
        for file, data in files.items():
            (folder / file).write_bytes(data)


def test_the_best_stays_beside_the_newest_and_the_log_tells_what_saving_cost(config_file: Path) -> None:
    run = train(config_file, "kept", "train.keep=1", "train.evaluate_every=4")
    rows = list(read_lines(run / "metrics.jsonl"))
    assert [row["step"] for row in rows if "train/checkpoint_wait_s" in row] == [5, 9]
    evaluated = {row["step"]: row["val/recall_at_1"] for row in rows if "val/recall_at_1" in row and row["step"] > 0}
    best = min(step for step, value in evaluated.items() if value == max(evaluated.values()))
    kept = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert kept == sorted({best, 12})
