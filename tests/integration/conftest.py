"""Reproducible runs of one process that nobody interrupted, to compare others with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CONFIG
from tests.runs import train

Reference = tuple[Path, dict[str, Any]]  # the config, and what the run ended with


@pytest.fixture(scope="session")
def small(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """30 steps on digits: small batches of 8 pieces, with augmentation, memory and averages."""
    folder = tmp_path_factory.mktemp("small")
    text = CONFIG.format(name="small", shards=digits, storage=folder / "runs")
    text = text.replace("precision: fp64", "precision: fp32, reproducible: true, micro_batch: 4")
    text = text.replace("steps: 50", "steps: 30").replace("checkpoint_every: 20", "checkpoint_every: 6")
    text = text.replace("crop: [0.7, 1]", "crop: [0.7, 1], color: 0.3, rotate: 10, blur: 0.5")
    path = folder / "run.yaml"
    path.write_text(f"{text}tracking: {{enabled: false}}\n")
    return path, train(path, "one", "cluster.workers=1", "data.threads=1")


EMOJI = """
name: emoji
data:
  train: {shards}/train
  eval: {shards}/eval
  image_size: 32
  batch: 128
  per_class: 2
  augment: {{crop: [0.6, 1.0], color: 0.3}}
encoder: {{name: convnet, dim: 64, widths: [32, 64], blocks: 1, grid: 2}}
loss: {{name: info_nce, learnable: true, memory: 512, memory_start: 50}}
optim: {{lr: 2.0e-3, warmup_steps: 50}}
train: {{steps: {steps}, {mode}, ema: 0.99, momentum: 0.99, log_every: 1, checkpoint_every: 25, evaluate_every: 100}}
cluster: {{workers: 1, storage: {storage}}}
tracking: {{enabled: false}}
"""


@pytest.fixture(scope="session")
def emoji(emoji_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """300 steps on emoji, reproducible, in fp32."""
    folder = tmp_path_factory.mktemp("reproducible")
    config = folder / "run.yaml"
    mode = "reproducible: true, micro_batch: 16"
    config.write_text(EMOJI.format(shards=emoji_shards, steps=300, mode=mode, storage=folder / "runs"))
    return config, train(config, "one", "data.threads=1")
