"""Training a ResNet-50 on a GPU from JPEGs: `nearfar train` against a bare torch loop on images that are on the GPU already."""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from cluster.runfolder import read_lines
from configs.schema import Encoder
from tests.benchmarks.measure import FULL, table
from tests.benchmarks.photos import pack_photos
from tests.kills import Watched
from tests.runs import start, wait_for
from trainer.encoders import build_encoder
from trainer.objective import build_objective

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees none here"),
]

SIDE, PAIRS, PACKED = 224, 128, 1024  # two images a pair
WARM, STEPS = 20, 80 if FULL else 50
MODEL = {"name": "timm", "model": "resnet50", "dim": 128, "weights": False}
LOSS = {"name": "info_nce", "temperature": 0.07}

CONFIG = """
name: card
data:
  {{train: {shards}, image_size: 224, batch: 128, threads: {threads}, prefetch: 8, decoded_mb: 0, augment: {augment}}}
encoder: {{name: timm, model: resnet50, dim: 128, weights: false}}
loss: {{name: info_nce, temperature: 0.07}}
optim: {{lr: 1.0e-4, warmup_steps: 10, clip_norm: 1.0}}
train: {{steps: {steps}, precision: bf16, channels_last: true, log_every: 10, checkpoint_every: 100000}}
cluster: {{workers: 1, gpus_per_worker: 1, storage: {storage}}}
tracking: {{enabled: false}}
"""
AUGMENTS = {"crops": "{crop: [0.3, 1.0]}", "crops, colour, flips": "{crop: [0.3, 1.0], flip: 0.5, color: 0.4, hue: 0.1}"}


def bare() -> tuple[float, float]:
    """(images a second, GiB at most) of the same step in plain torch, on two batches of floats that lie on the GPU."""
    torch.manual_seed(0)
    encoder = build_encoder(Encoder.model_validate(MODEL), SIDE).cuda().to(memory_format=torch.channels_last)
    objective = build_objective(LOSS)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4, fused=True)
    images = [torch.rand(2 * PAIRS, 3, SIDE, SIDE).cuda().to(memory_format=torch.channels_last) for _ in range(2)]
    record = torch.arange(2 * PAIRS, device="cuda") // 2
    torch.cuda.reset_peak_memory_stats()
    for step in range(STEPS):
        if step == WARM:
            torch.cuda.synchronize()
            began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            vectors = encoder(images[step % 2])
        loss, _ = objective(vectors, record, record=record, with_stats=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return (STEPS - WARM) * 2 * PAIRS / seconds, torch.cuda.max_memory_allocated() / 2**30


def trained(folder: Path, name: str, *settings: str) -> dict[str, float]:
    """What a run logged from step WARM on: medians. It is ended once the last step is logged."""
    driver = start(folder / "card.yaml", name, *settings, threads=4)
    watched = Watched(driver, folder / "runs" / name)
    wait_for(lambda: watched.logged() >= STEPS, driver, every_s=0.1)
    driver.kill()
    driver.communicate()
    rows = [row for row in read_lines(watched.run / "metrics.jsonl") if row["step"] > WARM]
    return {key: median(row[key] for row in rows if key in row) for key in rows[0]}


def test_a_resnet_50_is_fed_from_jpegs(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    threads = max(1, (os.cpu_count() or 1) - 2)
    pack_photos(tmp_path, 500, 375, pairs=PACKED)
    about: dict[str, Any] = {"shards": tmp_path / "shards", "storage": tmp_path / "runs", "threads": threads, "steps": STEPS}
    (tmp_path / "card.yaml").write_text(CONFIG.format(augment=AUGMENTS["crops"], **about))
    alone, held = bare()
    rows = [("bare loop", f"{alone:.0f}", "1.00", "", f"{held:.1f} GiB")]
    for label, augment in AUGMENTS.items():
        found = trained(tmp_path, f"run-{len(rows)}", f"data.augment={augment}")
        speed, memory = found["train/images_per_s"], found["system/gpu_memory_reserved_megabytes"] / 1024
        rows.append(
            (
                f"nearfar, {label}",
                f"{speed:.0f}",
                f"{speed / alone:.2f}",
                f"{found['train/wait_share']:.2f}",
                f"{memory:.1f} GiB",
            )
        )
    title = f"ResNet-50, bf16, channels last, {2 * PAIRS} images of {SIDE} a step, on {torch.cuda.get_device_name()}"
    table(f"{title}, {threads} threads for JPEGs of 500x375", ["", "images/s", "of the bare loop", "waits", "memory"], rows)
