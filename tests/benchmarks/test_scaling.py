"""Weak scaling: one worker and two, one torch thread each, the same share of the batch for each. No time is asserted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.plan.command import Options, assumptions, facts_of
from cluster.plan.facts import Told
from cluster.plan.scale import plan_for
from cluster.runfolder import read_lines
from configs.load import load_config
from tests.benchmarks.measure import FULL, table
from tests.runs import finish, start

pytestmark = pytest.mark.benchmark

SHARE, GOAL = 128, 0.85  # images of a worker; of twice the images/s of one
WARM, STEPS, ROUNDS = (20, 80, 3) if FULL else (10, 40, 2)  # steps before the clock starts, steps in all, rounds

CONFIG = """
name: scaling
data: {{train: {shards}/train, image_size: 32, batch: {batch}, per_class: 2, threads: 1}}
encoder: {{name: convnet, dim: 128}}
loss: {{name: info_nce}}
train: {{steps: {steps}, log_every: 10, checkpoint_every: 100000, evaluate_every: 100000}}
cluster: {{workers: {workers}, storage: {storage}}}
tracking: {{enabled: false}}
"""


def config_of(folder: Path, shards: Path, workers: int) -> Path:
    path = folder / f"{workers}.yaml"
    text = CONFIG.format(shards=shards, batch=SHARE * workers, steps=STEPS, workers=workers, storage=folder / "runs")
    path.write_text(text)
    return path


def images_per_s(config: Path, name: str, workers: int) -> float:
    finish(start(config, name, threads=1))
    rows = [row for row in read_lines(config.parent / "runs" / name / "metrics.jsonl") if row["step"] >= WARM]
    return SHARE * workers * (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["time"] - rows[0]["time"])


def test_two_workers_against_one(digits: Path, tmp_path: Path) -> None:
    configs = {workers: config_of(tmp_path, digits, workers) for workers in (1, 2)}
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(ROUNDS):  # in turns, so that a busy machine is busy for both
        for workers, config in configs.items():
            speeds[workers].append(images_per_s(config, f"run-{workers}-{number}", workers))
    best = {workers: max(found) for workers, found in speeds.items()}
    rows = []
    options = Options(told=Told(), gpu="cpu", decode_rate=1.0)
    for workers, config in configs.items():
        plan = plan_for(workers, facts_of(load_config(config), options), assumptions(options))
        ratio = best[workers] / (workers * best[1])
        megabytes = sum(plan.sent.values()) / 1e6
        rows.append((workers, f"{best[workers]:.0f}", f"{ratio:.3f}", f"{megabytes:.2f}", f"{plan.images_per_s:.0f}"))
    title = (
        f"weak scaling: convnet, 32 px, {SHARE} images a worker, one thread each, steps {WARM} to {STEPS}, best of {ROUNDS}; "
        f"goal {GOAL}, on {os.cpu_count()} cores"
    )
    table(title, ("workers", "images/s", "of ideal", "MB sent a worker and step", "images/s planned"), rows)
