"""What nearfar costs above the training itself: two workers against a bare DDP loop on tensors in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cluster.runfolder import MetricsFile, read_lines
from configs.schema import Encoder
from pipelines.pack import pack
from tests.benchmarks.measure import FULL, table
from tests.kills import readers
from tests.ranks import run_ranks
from tests.runs import PACE, finish, ranks, start, wait_for
from trainer.encoders import build_encoder
from trainer.objective import build_objective

pytestmark = pytest.mark.benchmark

WORLD, SIDE, BATCH = 2, 48, 256
ENCODER = Encoder.model_validate({"name": "convnet", "dim": 128})
LOSS = {"name": "info_nce", "temperature": 0.07}
# Steps before the clock starts, in all, and rounds. An epoch is 20 steps: after five, 31 of 32 images are kept decoded.
WARM, STEPS, ROUNDS = (100, 200, 3) if FULL else (100, 160, 2)
WARM_BARE = 10
EVERY = 10  # log_every

CONFIG = """
name: overhead
data: {{train: {shards}, image_size: 48, batch: 256, per_class: 2, threads: 1, augment: {augment}}}
encoder: {{name: convnet, dim: 128}}
loss: {{name: info_nce, temperature: 0.07}}
optim: {{lr: 1.5e-3, clip_norm: 1.0}}
train: {{steps: {steps}, log_every: 10, checkpoint_every: {save_every}, evaluate_every: 100000}}
cluster: {{workers: 2, storage: {storage}}}
tracking: {{enabled: {tracked}}}
"""
AUGMENT = "{crop: [0.7, 1.0], aspect: 1.25, rotate: 8, color: 0.25, hue: 0.025, grayscale: 0.1}"  # of the recipe


def bare() -> tuple[float, float]:
    """(seconds, CPU seconds) of a step of one rank, in plain torch; nothing is read, augmented, logged or saved."""
    torch.manual_seed(0)
    encoder, objective = build_encoder(ENCODER, SIDE), build_objective(LOSS)
    parallel = DistributedDataParallel(encoder)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1.5e-3, fused=True)
    share, rank = BATCH // WORLD, dist.get_rank()
    images = torch.rand(2, share, 3, SIDE, SIDE)
    group = torch.arange(share) // 2 + rank * share
    steps = STEPS - WARM
    for step in range(WARM_BARE + steps):
        if step == WARM_BARE:
            began, computed = time.perf_counter(), time.process_time()
        loss, _ = objective(parallel(images[step % 2]), group, with_stats=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) / steps, (time.process_time() - computed) / steps


def bare_speed() -> dict[str, float]:
    seconds, computed = zip(*run_ranks(WORLD, bare), strict=True)
    return {"images_per_s": BATCH / max(seconds), "cpu_s": sum(computed)}


def cpu_s(process: int) -> float:
    """Seconds that a process has computed so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def nearfar_speed(folder: Path, shards: Path, **options: Any) -> dict[str, float]:
    """Of `nearfar train`, one torch thread a worker, from step WARM on: images a second, and shares of the time."""
    settings = {"augment": "{}", "save_every": 100000, "tracked": "false", "local": True, **options}
    local, name = settings.pop("local"), f"run-{len(list(folder.iterdir()))}"
    config = folder / f"{name}.yaml"
    config.write_text(CONFIG.format(shards=shards, steps=STEPS, storage=folder / "runs", **settings))
    run, clock, computed = folder / "runs" / name, [], []
    driver = start(config, name, local=local)
    for step in (WARM, STEPS - EVERY):
        wait_for(lambda step=step: logged(run) >= step, driver)  # type: ignore[misc]
        clock.append((time.monotonic(), cpu_s(driver.pid)))
        workers = ranks(driver) if local else readers(shards)
        assert len(workers) == WORLD
        computed.append((logged(run), sum(map(cpu_s, workers))))
    finish(driver)
    rows = [row for row in read_lines(run / "metrics.jsonl") if row["step"] >= WARM]
    seconds = rows[-1]["time"] - rows[0]["time"]
    return {
        "images_per_s": (rows[-1]["step"] - rows[0]["step"]) * BATCH / seconds,
        "cpu_s": (computed[1][1] - computed[0][1]) / (computed[1][0] - computed[0][0]),
        "waited": sum(row["train/wait_share"] for row in rows[1:]) / len(rows[1:]),
        "saving": sum(row.get("train/checkpoint_wait_s", 0.0) for row in rows[1:]) / seconds,
        "driver": (clock[1][1] - clock[0][1]) / (clock[1][0] - clock[0][0]),
    }


def logged(run: Path) -> int:
    return max((row["step"] for row in read_lines(run / "metrics.jsonl")), default=-1)


def append_s(folder: Path) -> float:
    """Seconds that it takes to log a row, which is all of tracking that a step waits for."""
    metrics, row = MetricsFile(folder / "metrics.jsonl"), {f"{name}-{i}": 1 / 3 for name in PACE for i in range(4)}
    taken = []
    for step in range(200):
        began = time.perf_counter()
        metrics.append(step, row, at=time.time())
        taken.append(time.perf_counter() - began)
    return median(taken)


def test_images_per_second_against_a_bare_loop(emoji_shards: Path, tmp_path: Path) -> None:
    shrunk = tmp_path / "shrunk"  # of the emoji as published a quarter has 256 pixels a side, which cost most to decode
    pack(emoji_shards.parent / "images", shrunk, eval_fraction=0.2, split="class", max_side=64)
    (tmp_path / "runs").mkdir()

    def run(shards: Path = shrunk, **options: Any) -> Callable[[], dict[str, float]]:
        return lambda: nearfar_speed(tmp_path / "runs", shards / "train", **options)

    sides = {
        "bare DDP loop": bare_speed,
        "--local": run(),
        "--local, saved every 50 steps": run(save_every=50),
        "Ray": run(local=False),
    }
    if FULL:
        sides |= {
            "--local, images as published": run(emoji_shards),
            "--local, tracked": run(tracked="true"),
            "--local, augmented": run(augment=AUGMENT),
        }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(ROUNDS):  # in turns, so that a busy machine is busy for all
        for name, side in sides.items():
            found[name].append(side())
    best = {name: max(rounds, key=lambda one: one["images_per_s"]) for name, rounds in found.items()}
    base = best["bare DDP loop"]["images_per_s"]
    rows = []
    for name, one in best.items():
        shares = [f"{one[part]:.1%}" if part in one else "" for part in ("waited", "saving", "driver")]
        computed = min(each["cpu_s"] for each in found[name])
        speed = [f"{one['images_per_s']:.0f}", f"{one['images_per_s'] / base:.3f}", f"{computed:.3f}"]
        rows.append([name, *speed, *shares])
    logging_s = append_s(tmp_path)
    title = (
        f"convnet, {SIDE} px, batch {BATCH}, {WORLD} workers of one thread; steps {WARM} to {STEPS}, best of {ROUNDS}\n"
        f"a row of metrics takes {logging_s * 1e6:.0f} us, {logging_s * base / BATCH:.4%} of a step where each is logged"
    )
    table(title, ["side", "images/s", "of bare", "CPU s a step", "waited for data", "saving", "driver's CPU"], rows)
