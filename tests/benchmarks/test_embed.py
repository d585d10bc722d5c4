"""`nearfar embed` against the loop of evaluation, on the same shards in the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.measure import FULL, ROOT, table
from tests.cluster.encoders import export_small, pack_many

pytestmark = pytest.mark.benchmark
COUNT, SIDE = 50_000, 32
ROUNDS = 5 if FULL else 3
ENCODER = {"name": "convnet", "dim": 64, "patch": 4, "widths": [32, 64], "blocks": 1, "grid": 2}
LOOP = """
import json, sys, time
import torch
from cluster.models import open_model
from pipelines.manifest import Manifest
from pipelines.stream import evaluation_batches
from trainer.evaluate import embed

class Encoder(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = [module]

    def forward(self, images):
        return self.module[0](images)

model, manifest = open_model(sys.argv[1]), Manifest.open(sys.argv[2])
encoder, data = Encoder(model.module), model.data(sys.argv[2])
began = time.time()
found = embed(encoder, evaluation_batches(manifest, data), lambda batch: batch.images.contiguous())
print(json.dumps({"images_per_s": len(found.vectors) / (time.time() - began)}))
"""


def speed(*command: str) -> float:
    """What a process of its own tells, with one thread inside of operations: several wait for each other on a busy machine."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(json.loads(done.stdout)["images_per_s"])


def test_images_per_second_against_the_evaluation_loop(tmp_path: Path) -> None:
    model = str(export_small(tmp_path / "model", side=SIDE, encoder=ENCODER))
    shards = str(pack_many(tmp_path, COUNT, side=SIDE))
    sides = {"evaluation loop": [], "embed --local": ["--local"], "embed on Ray, a worker a CPU": []}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):  # in turns, so that a busy machine is busy for all
        for name, options in sides.items():
            if name == "evaluation loop":
                found[name].append(speed("-c", LOOP, model, shards))
                continue
            out = tmp_path / "v.parquet"
            found[name].append(speed("-m", "cluster.cli", "embed", model, shards, str(out), *options, "--json"))
            out.unlink()
    best = {name: max(speeds) for name, speeds in found.items()}
    base = best["evaluation loop"]
    rows = [[name, f"{value:.0f}", f"{value / base:.2f}"] for name, value in best.items()]
    what = f"{COUNT} JPEGs of {SIDE} pixels, {ENCODER['widths']} convnet, one torch thread a process"
    title = f"{what}; starts not counted, best of {ROUNDS}"
    table(title, ["side", "images/s", "of the loop"], rows)
