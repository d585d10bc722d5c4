"""Raw vectors from an exported encoder to a search by distance, and what is refused for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from scipy.spatial.distance import cdist

from cluster.nearest import nearest
from cluster.proof import Proof
from tests.cluster.encoders import SIDE, export_small
from tests.conftest import Answer
from tests.pipelines.conftest import fill_classes
from trainer.export import load_exported

Nearfar = Callable[..., Answer]
LENET = {"name": "lenet", "dim": 3, "widths": [4, 6], "hidden": [8]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a raw model and images."""
    folder = tmp_path_factory.mktemp("raw")
    export_small(folder / "model", side=SIDE, encoder=LENET)
    fill_classes(folder / "images", {"a": 10, "b": 11})
    return folder


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_nearest_by_distance_are_those_of_a_full_sort(chunk: int) -> None:
    random = np.random.default_rng(0)
    rows = (random.standard_normal((150, 4)) * 3 + 1000).astype(np.float32)
    rows = np.concatenate([rows, rows[:50]])  # ties
    queries = rows[:3] + np.float32(0.5)
    found = nearest(((at, rows[at : at + chunk]) for at in range(0, len(rows), chunk)), queries, 9, raw=True)
    distance = cdist(queries.astype(np.float64), rows.astype(np.float64))
    for best, exact in zip(found, distance, strict=True):
        order = np.lexsort((np.arange(len(rows)), exact))[:9]
        assert best.rows.tolist() == order.tolist()
        np.testing.assert_allclose(-best.scores, exact[order], rtol=1e-12)


def test_a_file_of_raw_vectors_is_searched_by_distance(place: Path, nearfar: Nearfar, tmp_path: Path) -> None:
    file = tmp_path / "v.parquet"
    assert nearfar("embed", place / "model", place / "images", file, "--local").code == 0
    table = pyarrow.parquet.read_table(file)
    vectors = np.stack(table["embedding"].to_numpy())
    assert not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.1)
    first, image = table["key"][0].as_py(), place / "images" / table["key"][0].as_py()
    answer = nearfar("search", file, "--key", first, "--image", image, "-k", 4, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["distance"] == "euclidean"
    distance = cdist(vectors[:1].astype(np.float64), vectors.astype(np.float64))[0]
    by_image, by_key = found["queries"]
    assert [hit["row"] for hit in by_key["hits"]] == (np.argsort(distance[1:], kind="stable") + 1)[:4].tolist()
    assert [hit["distance"] for hit in by_key["hits"]] == pytest.approx(np.sort(distance[1:])[:4].tolist())
    assert by_image["hits"][0]["row"] == 0
    assert by_image["hits"][0]["distance"] == pytest.approx(0, abs=1e-5)


def test_what_is_for_unit_vectors_is_refused(place: Path, nearfar: Nearfar, tmp_path: Path) -> None:
    file = tmp_path / "v.parquet"
    answer = nearfar("embed", place / "model", place / "images", file, "--local", "--dim", 2)
    assert answer.code == 2
    assert "leave --dim out" in answer.err
    assert nearfar("embed", place / "model", place / "images", file, "--local").code == 0
    answer = nearfar("search", file, "--key", "a/im 0.png", "--index", "faiss")
    assert answer.code == 2
    assert "searches by cosine" in answer.err
    for split in ("one", "two"):
        assert nearfar("pack", place / "images", tmp_path / split).code == 0
    answer = nearfar("inspect", tmp_path / "one", "--against", tmp_path / "two", "--model", place / "model")
    assert answer.code == 2
    assert "--threshold is a cosine" in answer.err


def test_a_copy_that_is_a_little_off_is_no_copy(place: Path) -> None:
    exported = load_exported(place / "model")
    files = [path.read_bytes() for path in sorted((place / "images").rglob("*.png"))]
    vectors = exported(files)
    Proof(files, vectors, raw=True).check(exported)
    with pytest.raises(RuntimeError, match="largest error"):  # every cosine is 1
        Proof(files, vectors, raw=True).check(lambda images: exported(images) * 1.1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("loss.normalize=true", "set loss.normalize: false, or encoder.raw: false"),
        ("loss.matryoshka=[1,2]", "loss.matryoshka"),
        ("tracking.promote.metric=uniformity", "tracking.promote.metric"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(place: Path, nearfar: Nearfar, tmp_path: Path, change: str, told: str) -> None:
    assert nearfar("pack", place / "images", tmp_path / "shards").code == 0
    (tmp_path / "c.yaml").write_text(
        f"name: x\ndata: {{train: {tmp_path}/shards, image_size: {SIDE}, batch: 8, per_class: 2}}\n"
        "encoder: {name: lenet, widths: [4, 6], hidden: [8]}\nloss: {name: contrastive, normalize: false}\n"
        f"train: {{steps: 1}}\noptim: {{lr: 0.001, warmup_steps: 0}}\ncluster: {{workers: 1, storage: {tmp_path}/runs}}\n"
    )
    assert nearfar("check", tmp_path / "c.yaml").code == 0
    answer = nearfar("check", tmp_path / "c.yaml", "--set", change)
    assert answer.code == 2
    assert told in answer.err


def test_two_ranks_train_a_raw_encoder_as_one_process_does(place: Path, nearfar: Nearfar, tmp_path: Path) -> None:
    assert nearfar("pack", place / "images", tmp_path / "shards").code == 0
    (tmp_path / "c.yaml").write_text(
        f"name: x\ndata: {{train: {tmp_path}/shards, image_size: {SIDE}, batch: 8, per_class: 2}}\n"
        "encoder: {name: lenet, widths: [4, 6], hidden: [8]}\nloss: {name: contrastive, normalize: false}\n"
        f"train: {{steps: 1}}\noptim: {{lr: 0.001, warmup_steps: 0}}\ncluster: {{workers: 2, storage: {tmp_path}/runs}}\n"
    )
    answer = nearfar("check", tmp_path / "c.yaml", "--exact")
    assert answer.code == 0, answer.err
