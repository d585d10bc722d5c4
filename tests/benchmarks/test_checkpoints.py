"""What checkpoints cost: a run that saves every 50 steps against one that does not."""

from __future__ import annotations

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
from tests.benchmarks.measure import FULL, table

pytestmark = pytest.mark.benchmark
STEPS, ROUNDS = (501, 3) if FULL else (101, 2)


def seconds(config_file: Path, every: int) -> tuple[float, float, int]:
    """(of all steps but the first, of them waited for checkpoints, bytes of a checkpoint)."""
    settings = [
        f"name=run-{uuid.uuid4().hex[:8]}",
        f"train.checkpoint_every={every}",
        f"train.steps={STEPS}",
        "cluster.workers=1",
    ]
    settings += ["data.eval=null", "train.precision=fp32", "loss={name: info_nce}", "train.ema=0.99", "train.momentum=0"]
    settings += ["encoder={name: convnet, dim: 128, patch: 2, widths: [32, 128], blocks: 1, grid: 2}"]
    config = absolute(load_config(config_file, settings))
    folder = RunFolder.of(config)
    folder.claim(config)
    histories = histories_of(config, folder, open_sources(config.data.train, None))
    launch.run(Job(config, folder.path, STEPS, histories, uuid.uuid4().hex[:8]), local=True)
    rows = list(read_lines(folder.metrics))
    waited = sum(row.get("train/checkpoint_wait_s", 0.0) for row in rows)
    size = sum(path.stat().st_size for path in (folder.path / "checkpoints" / f"step-{STEPS:08d}").iterdir())
    return rows[-1]["time"] - rows[0]["time"], waited, size


def test_checkpoints_every_50_steps(config_file: Path) -> None:
    best: dict[int, tuple[float, float, int]] = {}
    for _ in range(ROUNDS):  # in turns, so that a busy machine is busy for all
        for every in (10**6, 50):
            best[every] = min(best.get(every, (float("inf"), 0.0, 0)), seconds(config_file, every))
    base = best[10**6][0]
    rows = [
        [
            "none" if every > STEPS else f"every {every} steps",
            f"{total / (STEPS - 1) * 1e3:.1f}",
            f"{total / base - 1:+.1%}",
            f"{waited / total:.2%}",
            f"{size / 2**20:.1f}",
        ]
        for every, (total, waited, size) in best.items()
    ]
    table(f"checkpoints, {STEPS} steps, 1 worker", ["saved", "ms a step", "slower", "stood still", "MiB each"], rows)
