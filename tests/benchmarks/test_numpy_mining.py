"""Online triplets of the whole batch against the way they are often mined: in numpy, pair by pair, on the host.

Equal network, data, batches, optimizer and steps: those of the recipe `siamese-triplet-5-online-triplets`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cluster.building import plain
from cluster.recipes import make_data
from configs.load import load_config
from pipelines.manifest import Manifest
from pipelines.stream import Loader, evaluation_batches
from tests.benchmarks.measure import FULL, THREADS, table
from trainer.encoders import build_encoder
from trainer.evaluate import embed
from trainer.measurement import measure
from trainer.optim import build_optimizer, set_rate
from trainer.schedules import learning_rate

pytestmark = pytest.mark.benchmark

RECIPE = "siamese-triplet-5-online-triplets"
STEPS = 600 if FULL else 300  # of 250 images; an epoch are 196
PLACE = Path(os.environ.get("NEARFAR_RECIPES", "demo"))  # where `make recipes` keeps its data
SETTINGS = (
    *(f"train.steps={STEPS}", f"train.checkpoint_every={STEPS}", f"train.evaluate_every={STEPS}"),
    *(f"optim.milestones=[{STEPS * 2 // 5}, {STEPS * 4 // 5}]", "tracking.enabled=false"),
    *("finish.report=false", "finish.onnx=false", "evaluate.at_end=[]", "evaluate.metrics=[map_at_r]"),
)


def test_online_triplets_against_numpy_mining(tmp_path: Path) -> None:
    make_data(RECIPE, PLACE)
    epoch_steps = Manifest.open(PLACE / "shards/fashion/train").num_samples / 250
    rows = []
    for workers in (1, 2):
        seconds, found = ours(tmp_path, workers)
        rows.append((f"nearfar, {workers} worker{'s'[: workers - 1]}", seconds, found))
    seconds, found = with_numpy()
    rows.append((f"per-batch numpy mining, one process, {THREADS} threads", seconds, found))
    table(
        f"{RECIPE}, {STEPS} steps of 250 images",
        ("", "s an epoch", "of numpy's", "MAP@R"),
        [(name, f"{s * epoch_steps:.1f}", f"{s / seconds:.2f}", f"{quality:.3f}") for name, s, quality in rows],
    )
    assert all(quality > 0.5 for _, _, quality in rows)


def ours(storage: Path, workers: int) -> tuple[float, float]:
    """(seconds a step, MAP@R) of the recipe."""
    settings = (*SETTINGS, f"cluster.workers={workers}", f"name=w{workers}", f"cluster.storage={storage}")
    program = Path(sys.executable).with_name("nearfar")
    command = [program, "train", RECIPE, "--local", *(part for one in settings for part in ("--set", one))]
    done = subprocess.run(command, cwd=PLACE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (storage / f"w{workers}" / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "train/loss" in row]
    # From the first logged step to the last but one: the last row waits for the evaluation.
    return (logged[-2]["time"] - logged[0]["time"]) / (logged[-2]["step"] - logged[0]["step"]), rows[-1]["val/map_at_r"]


def with_numpy() -> tuple[float, float]:
    """The same with the loop that many projects have: distances to the host, a loop over pairs, triplets back as indices."""
    torch.set_num_threads(THREADS)
    config = load_config(RECIPE, SETTINGS)
    data = config.data.model_copy(
        update={"train": (config.data.train[0].model_copy(update={"path": str(PLACE / "shards/fashion/train")}),)}
    )
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    encoder = build_encoder(config.encoder, data.image_size)
    optimizer = build_optimizer(config.optim, [encoder])
    prepare = plain(torch.device("cpu"), torch.float32)
    with Loader(Manifest.open(data.train[0].path), data, seed=config.seed) as stream:
        times = []
        for step in range(1, STEPS + 1):
            batch = next(stream)
            set_rate(optimizer, learning_rate(config.optim, step, STEPS))
            vectors = encoder(prepare(batch))
            a, p, n = mined(vectors.detach(), batch.group, rng)
            d_ap, d_an = ((vectors[a] - vectors[other]).pow(2).sum(1) for other in (p, n))
            loss = F.relu(d_ap - d_an + 1.0).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), config.optim.clip_norm or torch.inf)
            optimizer.step()
            times.append(time.perf_counter())
    held_out = Manifest.open(PLACE / "shards/fashion-eval")
    found = measure(embed(encoder, evaluation_batches(held_out, data), prepare), ["map_at_r"])
    return (times[-1] - times[9]) / (STEPS - 10), found.values["map_at_r"]


def mined(vectors: Tensor, group: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """For every pair of a class a random negative whose hinge of squared distances is above 0, if there is one."""
    x: NDArray[np.float32] = vectors.numpy()
    squared = (x * x).sum(1)[:, None] + (x * x).sum(1)[None, :] - 2 * x @ x.T
    labels, triplets = group.numpy(), []
    for label in np.unique(labels):
        own, others = np.flatnonzero(labels == label), np.flatnonzero(labels != label)
        for anchor, positive in itertools.combinations(own.tolist(), 2):
            hard = others[squared[anchor, positive] - squared[anchor, others] + 1.0 > 0]
            if len(hard):
                triplets.append((anchor, positive, int(rng.choice(hard))))
    a, p, n = torch.tensor(triplets or [(0, 0, 0)]).unbind(1)
    return a, p, n
