"""`train.reproducible` from the command line: curves and weights that can be compared by `cmp`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.runfolder import read_lines
from tests.conftest import CONFIG

ROOT = Path(__file__).parents[2]
PACE = ("time", "train/images_per_s", "train/wait_share", "train/checkpoint_wait_s", "train/log_s")
MACHINE = ("loader/", "system/")


def command(config: Path, name: str, *settings: str, local: bool = True, resume: bool = False) -> list[str]:
    flags = [*(["--local"] if local else []), *(["--resume"] if resume else [])]
    pairs = [part for setting in (f"name={name}", *settings) for part in ("--set", setting)]
    return [sys.executable, "-m", "cluster.cli", "train", str(config), "--json", *flags, *pairs]


def train(config: Path, name: str, *settings: str, threads: int = 1, **how: Any) -> dict[str, Any]:
    """`nearfar train` as its own process, with so many threads inside of operations."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command(config, name, *settings, **how), cwd=ROOT, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "stderr": done.stderr}


def curve(run: str) -> list[dict[str, float]]:
    """All that was logged but for the pace, the loaders' counts and the machine's own."""
    rows = list(read_lines(Path(run) / "metrics.jsonl"))
    return [{k: v for k, v in row.items() if k not in PACE and not k.startswith(MACHINE)} for row in rows]


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert curve(found["run"]) == curve(expected["run"])
    assert found["weights"] == expected["weights"]
    assert found["metrics"] == expected["metrics"]


@pytest.fixture
def reproducible_config(digits: Path, tmp_path: Path) -> Path:
    """Small batches of 8 pieces, with augmentation, memory and averages."""
    text = CONFIG.format(name="small", shards=digits, storage=tmp_path / "runs")
    text = text.replace("precision: fp64", "precision: fp32, reproducible: true, micro_batch: 4")
    text = text.replace("steps: 50", "steps: 30").replace("checkpoint_every: 20", "checkpoint_every: 12")
    text = text.replace("crop: [0.7, 1]", "crop: [0.7, 1], color: 0.3, rotate: 10, blur: 0.5")
    path = tmp_path / "run.yaml"
    path.write_text(f"{text}tracking: {{enabled: false}}\n")
    return path


def test_two_processes_with_more_threads_give_the_very_numbers_of_one(reproducible_config: Path) -> None:
    one = train(reproducible_config, "one", "cluster.workers=1", "data.threads=1")
    two = train(reproducible_config, "two", "cluster.workers=2", "data.threads=3", threads=3)
    assert [row["step"] for row in curve(one["run"])] == list(range(31))
    assert_equal(two, one)
    hashes = list(read_lines(Path(one["run"]) / "hashes.jsonl"))
    assert [row["step"] for row in hashes] == [12, 24, 30]
    assert hashes == list(read_lines(Path(two["run"]) / "hashes.jsonl"))
    assert hashes[-1]["weights"] == one["weights"]
    assert f"step 30: weights {one['weights']}" in one["stderr"]


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """300 steps on emoji in one process, never interrupted."""
    from pipelines.pack import pack
    from pipelines.sources.emoji import fetch

    folder = tmp_path_factory.mktemp("emoji")
    fetch(folder / "images")
    pack(folder / "images", folder / "shards", eval_fraction=0.2, split="class")
    config = folder / "run.yaml"
    config.write_text(
        f"""
name: emoji
data:
  train: {folder}/shards/train
  eval: {folder}/shards/eval
  image_size: 32
  batch: 128
  per_class: 2
  augment: {{crop: [0.6, 1.0], color: 0.3}}
encoder: {{name: convnet, dim: 64, widths: [32, 64], blocks: 1, grid: 2}}
loss: {{name: info_nce, learnable: true, memory: 512, memory_start: 50}}
optim: {{lr: 2.0e-3, warmup_steps: 50}}
train:
  {{steps: 300, reproducible: true, micro_batch: 16, ema: 0.99, momentum: 0.99, log_every: 1, checkpoint_every: 25,
   evaluate_every: 100}}
cluster: {{workers: 1, storage: {folder}/runs}}
tracking: {{enabled: false}}
"""
    )
    return config, train(config, "one", "data.threads=1")


SCHEDULES: dict[str, dict[str, Any]] = {
    "two": {"settings": ["cluster.workers=2", "data.threads=3"], "threads": 3},
    "four": {"settings": ["cluster.workers=4"]},
    "ray": {"settings": ["cluster.workers=2"], "local": False},
}


@pytest.mark.acceptance
@pytest.mark.parametrize("name", SCHEDULES)
def test_300_steps_on_emoji_are_the_same_anywhere(emoji: tuple[Path, dict[str, Any]], name: str) -> None:
    how = dict(SCHEDULES[name])
    assert_equal(train(emoji[0], name, *how.pop("settings"), **how), emoji[1])


@pytest.mark.acceptance
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 3)])
def test_300_steps_on_emoji_are_the_same_when_killed_and_resumed(
    emoji: tuple[Path, dict[str, Any]], before: int, after: int
) -> None:
    config, expected = emoji
    name = f"killed-{before}-{after}"
    metrics, step = Path(expected["run"]).parent / name / "metrics.jsonl", random.randint(30, 270)
    asked = command(config, name, f"cluster.workers={before}")
    driver = subprocess.Popen(asked, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(list(read_lines(metrics))) < step:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(driver.pid, signal.SIGKILL)  # the ranks too
    driver.wait()
    assert_equal(train(config, name, f"cluster.workers={after}", resume=True), expected)
