"""Two towers from the config to the exported folders: images towards trainable vectors, and images towards other images."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from cluster.models import open_model
from cluster.outcome import trained_encoder
from cluster.runfolder import RunFolder
from tests.conftest import Answer
from tests.integration.test_train import curve
from trainer.encoders.towers import Towers

DIM, EACH = 12, 30
ANCHOR = "{name: convnet, dim: 10, patch: 2, widths: [8, 16], blocks: 1, grid: 2}"
POSITIVE = {
    "text": "{name: projection, dim: 10, hidden: [16], dropout: 0.1}",
    "images": "{name: convnet, dim: 10, patch: 2, widths: [8], blocks: 1, grid: 2}",
}
CONFIG = """
name: {name}
seed: 3
data: {{train: "{data}/{name}/train", eval: "{data}/{name}/eval", image_size: 16, batch: 40, augment: {{crop: [0.8, 1]}}}}
encoder: {{anchor: {anchor}, positive: {positive}}}
loss: {{name: info_nce, temperature: 0.1, queries: anchors, candidates: other_view, symmetric: true}}
optim: {{lr: 3.0e-3, warmup_steps: 2}}
train: {{steps: 16, log_every: 1, checkpoint_every: 8, evaluate_every: 16}}
evaluate: {{queries: anchors}}
cluster: {{workers: 1, storage: "{data}/runs"}}
tracking: {{enabled: false}}
finish: {{report: false, onnx: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits, paired with a vector of their class and with another one of it; and labelled ones."""
    from pipelines.pack import pack
    from pipelines.sources.digits import fetch

    root = tmp_path_factory.mktemp("towers")
    fetch(root / "digits")
    vectors = np.random.default_rng(0).standard_normal((10, DIM)).astype(np.float32)
    classes = sorted(path for path in (root / "digits").iterdir() if path.is_dir())
    paths = [[str(path.relative_to(root)) for path in sorted(one.glob("*"))[: 2 * EACH]] for one in classes]
    rows = {
        "text": [{"anchor": p, "positive": vectors[n].tolist(), "group": str(n)} for n in range(10) for p in paths[n][:EACH]],
        "images": [{"anchor": paths[n][2 * i], "positive": paths[n][2 * i + 1]} for n in range(10) for i in range(EACH)],
        "labelled": [{"image": p, "label": str(n)} for n in range(10) for p in paths[n][:EACH]],
    }
    for name, records in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
        kind = "labelled" if name == "labelled" else "pair"
        pack(root / f"{name}.jsonl", root / name, kind=kind, eval_fraction=0.2, split="record")
        if name in POSITIVE:
            (root / f"{name}.yaml").write_text(CONFIG.format(name=name, data=root, anchor=ANCHOR, positive=POSITIVE[name]))
    return root


@pytest.fixture
def run(folder: Path, nearfar: Callable[..., Answer]) -> Callable[..., dict[str, Any]]:
    """A command with settings, and what it prints with --json."""

    def call(command: str, config: str, *settings: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
        pairs = [word for one in settings for word in ("--set", one)]
        answer = nearfar(command, folder / f"{config}.yaml", "--json", *flags, *pairs)
        assert answer.code == 0, answer.err
        found: dict[str, Any] = json.loads(answer.out)
        return found

    return call


def test_a_trained_text_side_helps_to_find_texts_and_two_workers_give_the_same_bits(
    folder: Path, run: Callable[..., dict[str, Any]]
) -> None:
    fixed = ("train.reproducible=true", "train.micro_batch=5")
    one = run("train", "text", "name=one", *fixed, flags=("--local",))
    two = run("train", "text", "name=two", *fixed, "cluster.workers=2", flags=("--local",))
    assert one["weights"] is not None
    assert one["weights"] == two["weights"]
    assert one["metrics"] == two["metrics"]
    assert one["metrics"]["map_at_r"] > one["before"]["map_at_r"] + 0.1
    encoder = trained_encoder(RunFolder(folder / "runs/one").config(), RunFolder(folder / "runs/one"))
    assert isinstance(encoder, Towers)
    exported = folder / "runs/one/export"
    assert open_model(str(exported)).dim == 10
    specification = importlib.util.spec_from_file_location("exported_projection", exported / "positive/model.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    given = np.random.default_rng(1).standard_normal((9, DIM)).astype(np.float32)
    with torch.no_grad():
        expected = encoder.positive(torch.from_numpy(given)).numpy()
    np.testing.assert_allclose(module.Projection(exported / "positive")(given), expected, atol=1e-6)


def vectors_of(nearfar: Callable[..., Answer], model: Path, shards: Path, out: Path) -> tuple[NDArray[Any], list[str]]:
    answer = nearfar("embed", model, shards, out, "--local", "--json")
    assert answer.code == 0, answer.err
    table = pq.read_table(out)
    return np.array(table["embedding"].to_pylist()), table["member"].to_pylist()


def test_image_towers_train_on_two_workers_in_pieces_go_on_and_are_embedded_each_by_its_own(
    folder: Path, run: Callable[..., dict[str, Any]], nearfar: Callable[..., Answer], tmp_path: Path
) -> None:
    settings = ("train.precision=fp64", "train.ema=0.9", "train.momentum=0.9")
    one = run("train", "images", "name=whole", *settings, flags=("--local",))
    two = run("train", "images", "name=split", *settings, "cluster.workers=2", "train.micro_batch=7", flags=("--local",))
    found = curve(two)
    for step, row in curve(one).items():
        for name in ("train/loss", "train/grad_norm", "val/recall_at_1"):
            if name in row:
                assert found[step][name] == pytest.approx(row[name], rel=1e-7), (step, name)
    home = folder / "runs/whole"
    last = sorted((home / "checkpoints").iterdir())[-1]
    before = load_file(last / "encoder.safetensors")
    shutil.rmtree(last)
    (home / "result.json").unlink()
    run("train", "images", "name=whole", *settings, flags=("--local", "--resume"))
    after = load_file(last / "encoder.safetensors")
    assert {name.partition(".")[0] for name in after} == {"anchor", "positive"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    shards = folder / "images/eval"
    rows, members = vectors_of(nearfar, home, shards, tmp_path / "own.parquet")
    anchors, _ = vectors_of(nearfar, home / "export", shards, tmp_path / "anchor.parquet")
    others, _ = vectors_of(nearfar, home / "export/positive", shards, tmp_path / "positive.parquet")
    is_anchor = np.array([member == "anchor" for member in members])[:, None]
    np.testing.assert_allclose(rows, np.where(is_anchor, anchors, others), atol=1e-5)
    assert np.abs(anchors - others).max() > 0.1


def test_a_tower_begins_with_the_weights_of_a_run(folder: Path, run: Callable[..., dict[str, Any]]) -> None:
    source = run("train", "images", "name=source", "train.steps=2", "optim.warmup_steps=0", flags=("--local",))
    settings = ["name=warm", "train.steps=1", "optim.lr=1e-12", "optim.warmup_steps=0", "seed=9"]
    settings += [f"encoder.anchor.init={source['run']}", f"encoder.positive.init={source['run']}/export/positive"]
    warm = run("train", "images", *settings, flags=("--local",))
    weights = [load_file(sorted(Path(one["run"]).glob("checkpoints/*"))[-1] / "encoder.safetensors") for one in (source, warm)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["text", "images"])
def test_two_ranks_are_proven_exact(name: str, run: Callable[..., dict[str, Any]]) -> None:
    assert run("check", name, flags=("--exact",))["exact"]["exact"]


def test_mistakes_are_told_before_training(folder: Path, nearfar: Callable[..., Answer]) -> None:
    def told(kind: str, *settings: str) -> str:
        answer = nearfar("check", folder / f"{kind}.yaml", *(word for one in settings for word in ("--set", one)))
        assert answer.code == 2
        return answer.err

    assert "towers are for pair, labelled_pair, triplet data" in told("images", f"data.train={folder}/labelled/train")
    assert "positives or negatives of data.train are vectors; take name: projection" in told(
        "text", f"encoder.positive={ANCHOR}"
    )
    assert "positives or negatives of data.eval are images" in told("text", f"data.eval={folder}/images/eval")
    assert "input_dim is 7, but the vectors of data.train have 12 numbers" in told("text", "encoder.positive.input_dim=7")
    assert "the data has no vectors" in told("images", "encoder.positive={name: projection, dim: 10}")
    assert "encoder.positive.dim is 10, but encoder.anchor.dim is 64" in told("text", "encoder.anchor.dim=64")
    assert "did you mean 'hidden'?" in told("text", "encoder.positive.hiden=[3]")
    assert "did you mean 'projection'?" in told("text", "encoder.positive.name=projecton")
    told_of = told("text", f"data.eval={folder}/labelled/eval")
    assert "queries: anchors is for pairs and triplets" in told_of
