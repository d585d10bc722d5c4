"""What checkpoints cost: a run that saves every 50 steps against one that does not."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import launch, saving
from cluster.job import Job
from cluster.paths import absolute
from cluster.resume import histories_of
from cluster.runfolder import RunFolder, read_lines
from configs.load import load_config
from pipelines.mixture import open_sources
from tests.benchmarks.measure import FULL, table

pytestmark = pytest.mark.benchmark
STEPS, ROUNDS = (301, 3) if FULL else (101, 2)
ENCODERS = {  # whose steps take about 20 and 100 ms here, of 64 digits; the recipe's take 450
    "small": "{name: convnet, dim: 128, patch: 2, widths: [32, 128], blocks: 1, grid: 2}",
    "larger": "{name: convnet, dim: 128, patch: 2, widths: [64, 256], blocks: 3, grid: 2}",
}


@contextmanager
def written() -> Iterator[list[float]]:
    """CPU seconds of the thread that writes, for each checkpoint."""
    found: list[float] = []
    save = saving.checkpoints.save

    def timed(*args: object, **options: object) -> None:
        began = time.thread_time()
        save(*args, **options)  # type: ignore[arg-type]
        found.append(time.thread_time() - began)

    saving.checkpoints.save = timed
    try:
        yield found
    finally:
        saving.checkpoints.save = save


def seconds(config_file: Path, encoder: str, every: int) -> tuple[float, float, int, float]:
    """(of all steps but the first, of them waited for checkpoints, bytes of a checkpoint, CPU seconds to write one)."""
    settings = [
        f"name=run-{uuid.uuid4().hex[:8]}",
        f"train.checkpoint_every={every}",
        f"train.steps={STEPS}",
        "cluster.workers=1",
    ]
    settings += ["data.eval=null", "train.precision=fp32", "loss={name: info_nce}", "train.ema=0.99", "train.momentum=0"]
    settings += [f"encoder={ENCODERS[encoder]}"]
    config = absolute(load_config(config_file, settings))
    folder = RunFolder.of(config)
    folder.claim(config)
    histories = histories_of(config, folder, open_sources(config.data.train, None))
    with written() as computed:
        launch.run(Job(config, folder.path, STEPS, histories, uuid.uuid4().hex[:8]), local=True)
    rows = list(read_lines(folder.metrics))
    waited = sum(row.get("train/checkpoint_wait_s", 0.0) for row in rows)
    size = sum(path.stat().st_size for path in (folder.path / "checkpoints" / f"step-{STEPS:08d}").iterdir())
    return rows[-1]["time"] - rows[0]["time"], waited, size, sum(computed) / len(computed)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_checkpoints_every_50_steps(config_file: Path, encoder: str) -> None:
    best: dict[int, tuple[float, float, int, float]] = {}
    for _ in range(ROUNDS):  # in turns, so that a busy machine is busy for all
        for every in (10**6, 50):
            best[every] = min(best.get(every, (float("inf"), 0.0, 0, 0.0)), seconds(config_file, encoder, every))
    base = best[10**6][0]
    rows = [
        [
            "none" if every > STEPS else f"every {every} steps",
            f"{total / (STEPS - 1) * 1e3:.1f}",
            f"{total / base - 1:+.1%}",
            f"{waited / total:.2%}",
            f"{size / 2**20:.1f}",
            f"{computed * 1e3:.0f} ms",
            f"{computed * (STEPS - 1) / (50 * total):.2%}",
        ]
        for every, (total, waited, size, computed) in best.items()
    ]
    table(
        f"checkpoints, {STEPS} steps, 1 worker, {encoder} encoder",
        ["saved", "ms a step", "slower", "stood still", "MiB each", "CPU each", "of 50 steps"],
        rows,
    )
