"""Images trained towards vectors that are given: as the other half of a pair, and as a target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.gallery import Gallery
from cluster.outcome import trained_encoder
from cluster.runfolder import RunFolder, read_lines
from pipelines.decode import read_header
from tests.conftest import Answer
from tests.integration.test_train import curve

DIM, EACH = 12, 30
CONFIG = """
name: {name}
seed: 3
data: {{train: "{data}/{name}/train", eval: "{data}/{name}/eval", image_size: 16, batch: 40, augment: {{crop: [0.8, 1]}}}}
encoder: {{name: convnet, dim: {dim}, patch: 2, widths: [8, 16], blocks: 1, grid: 2}}
loss: {loss}
optim: {{lr: 3.0e-3, warmup_steps: 2}}
train: {{steps: 20, precision: fp64, log_every: 1, checkpoint_every: 20, evaluate_every: 20}}
cluster: {{workers: 1, storage: "{data}/runs"}}
tracking: {{enabled: false}}
"""
LOSSES = {
    "pair": "{name: info_nce, temperature: 0.1, queries: anchors, candidates: other_view, symmetric: true}",
    "labelled": "{name: regress, kind: cosine}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few handwritten digits with a random vector for each class: as pairs of both, and labelled with it as a target."""
    from pipelines.pack import pack
    from pipelines.sources.digits import fetch

    root = tmp_path_factory.mktemp("towards")
    fetch(root / "images")
    vectors = np.random.default_rng(0).standard_normal((10, DIM)).astype(np.float32)
    paths = [(path.relative_to(root), number) for number in range(10) for path in _some(root / "images", number)]
    pairs = [{"anchor": str(path), "positive": vectors[n].tolist(), "group": str(n)} for path, n in paths]
    labelled = [{"image": str(path), "label": str(n), "target": vectors[n].tolist()} for path, n in paths]
    for kind, rows in {"pair": pairs, "labelled": labelled}.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pack(root / f"{kind}.jsonl", root / kind, kind=kind, eval_fraction=0.2, split="record")
        config = CONFIG.format(name=kind, data=root, dim=DIM, loss=LOSSES[kind])
        (root / f"{kind}.yaml").write_text(config if kind == "pair" else config.replace("batch: 40", "batch: 40, per_class: 2"))
    return root


def _some(images: Path, number: int) -> list[Path]:
    return sorted(sorted(path for path in images.iterdir() if path.is_dir())[number].glob("*"))[:EACH]


def train(nearfar: Callable[..., Answer], config: Path, *settings: str) -> dict[str, Any]:
    answer = nearfar("train", config, "--local", "--json", *(word for one in settings for word in ("--set", one)))
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


def test_images_learn_to_find_their_vectors_and_two_processes_give_the_curve_of_one(
    folder: Path, nearfar: Callable[..., Answer]
) -> None:
    one = train(nearfar, folder / "pair.yaml", "name=one")
    losses = {step: row["train/loss"] for step, row in curve(one).items() if step}
    assert losses[20] < 0.7 * losses[1]
    assert one["metrics"]["map_at_r"] > one["before"]["map_at_r"] + 0.05
    settings = ["name=two", "cluster.workers=2", "train.micro_batch=7", "data.threads=3"]
    expected, found = curve(one), curve(train(nearfar, folder / "pair.yaml", *settings))
    for step, row in expected.items():
        for name in ("train/loss", "train/grad_norm", "val/recall_at_1", "val/map_at_r"):
            if name in row:
                assert found[step][name] == pytest.approx(row[name], rel=1e-8), (step, name)


def test_images_learn_to_be_their_targets(folder: Path, nearfar: Callable[..., Answer]) -> None:
    result = train(nearfar, folder / "labelled.yaml")
    rows = [row for row in read_lines(Path(result["run"]) / "metrics.jsonl") if "train/loss" in row]
    assert rows[-1]["train/loss"] < 0.6 * rows[0]["train/loss"]


def test_the_report_shows_vectors_by_their_names(folder: Path, nearfar: Callable[..., Answer]) -> None:
    run = RunFolder(folder / "runs" / "one")
    config = run.config()
    with Gallery(config, trained_encoder(config, run)) as gallery:
        assert int(gallery.shown.sum()) == gallery.manifest.num_images == gallery.manifest.num_samples
        assert len(gallery.group) == 2 * gallery.manifest.num_samples
        assert all(read_header(image).width for image in gallery.some(100))
        given, other = gallery.given()
        assert len(given) == gallery.manifest.num_samples
        assert not len(other)
        assert (gallery.group[given[:, 0]] == gallery.group[given[:, 1]]).all()
    answer = nearfar("report", run.path, "--json")
    assert answer.code == 0, answer.err
    page = Path(json.loads(answer.out)["report"]).read_text(encoding="utf-8")
    assert '<div class="text">' in page
    assert "Given as the same thing, and least alike." in page


def test_mistakes_name_the_setting(folder: Path, nearfar: Callable[..., Answer]) -> None:
    def check(kind: str, *settings: str) -> str:
        answer = nearfar("check", folder / f"{kind}.yaml", *(word for one in settings for word in ("--set", one)))
        assert answer.code == 2
        return answer.err

    assert "encoder.dim is 16, but the vectors of the data have 12 numbers" in check("pair", "encoder.dim=16")
    told = check(
        "labelled", f"data.train={folder}/labelled/train", f"data.eval={folder}/pair/eval", "encoder.dim=16", "loss.kind=mse"
    )
    assert "set encoder.dim to the target's size" in told
    told = check("labelled", f"data.eval={folder}/pair/eval", "encoder.dim=16", "loss={name: sup_con}")
    assert "data.eval: its vectors have 12 numbers, but encoder.dim is 16" in told
    told = check("pair", "loss={name: regress}")
    assert "pack records with a target (a column `target` of a table" in told
    told = check("pair", "loss={name: info_nce, ignore_closer_than: 0.1}")
    assert "ignore_closer_than needs `target`" in told
    assert "column `target`" in told
