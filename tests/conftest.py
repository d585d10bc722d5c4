"""Shared material: real images packed once, and the command line called in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str


@pytest.fixture
def nearfar(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """`nearfar("pack", source, out)`: the command line without the start of a process."""
    from cluster import cli

    def call(*arguments: object) -> Answer:
        capfd.readouterr()
        monkeypatch.setattr("sys.argv", ["nearfar", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return call


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's handwritten digits as shards: train and eval, split by record."""
    from pipelines.pack import pack
    from pipelines.sources.digits import fetch

    folder = tmp_path_factory.mktemp("digits")
    fetch(folder / "images")
    pack(folder / "images", folder / "shards", eval_fraction=0.2, split="record")
    return folder / "shards"


@pytest.fixture(scope="session")
def emoji_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same emoji by four hands, as shards: train and eval, split by class."""
    from pipelines.pack import pack
    from pipelines.sources.emoji import fetch

    folder = tmp_path_factory.mktemp("emoji")
    fetch(folder / "images")
    pack(folder / "images", folder / "shards", eval_fraction=0.2, split="class")
    return folder / "shards"


CONFIG = """
name: {name}
seed: 3
data:
  {{train: "{shards}/train", eval: "{shards}/eval", image_size: 16, batch: 32, per_class: 2, augment: {{crop: [0.7, 1]}}}}
encoder: {{name: convnet, dim: 16, patch: 2, widths: [8, 16], blocks: 1, grid: 2}}
loss:
  - {{name: info_nce, temperature: 0.1, learnable: true, memory: 100, memory_start: 10}}
  - {{name: triplet, miner: semi_hard, weight: 0.5}}
optim: {{lr: 1.0e-3, warmup_steps: 5}}
train: {{steps: 50, precision: fp64, ema: 0.9, momentum: 0.95, log_every: 1, checkpoint_every: 20, evaluate_every: 25}}
cluster: {{workers: 2, storage: "{storage}", max_failures: 1}}
"""


@pytest.fixture
def config_file(digits: Path, tmp_path: Path) -> Path:
    """A small run on the digits, in float64, whose storage is `tmp_path`/runs."""
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(name="small", shards=digits, storage=tmp_path / "runs"))
    return path
