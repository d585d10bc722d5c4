"""`nearfar search`: exact, ties by order, and never with vectors of another model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cluster import embeddings as files
from cluster.nearest import nearest
from tests.cluster.encoders import DIM
from tests.conftest import Answer
from tests.pipelines.conftest import fill_classes

Nearfar = Callable[..., Answer]


@pytest.fixture(scope="module")
def place(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and images."""
    folder = tmp_path_factory.mktemp("search")
    shutil.copytree(small_model, folder / "model")
    fill_classes(folder / "images", {"a": 20, "b": 21})
    shutil.copy(folder / "images" / "a" / "im 3.png", folder / "images" / "b" / "again.png")
    return folder


@pytest.fixture
def file(place: Path, nearfar: Nearfar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its embeddings, in several row groups."""
    monkeypatch.setattr(files, "GROUP_BYTES", 4 * DIM * 10)
    answer = nearfar("embed", place / "model", place / "images", tmp_path / "v.parquet", "--local")
    assert answer.code == 0, answer.err
    assert pyarrow.parquet.ParquetFile(tmp_path / "v.parquet").num_row_groups == 5
    return tmp_path / "v.parquet"


def units(count: int, dim: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_the_nearest_are_those_of_a_full_sort_in_float64_with_ties_by_row(chunk: int, k: int) -> None:
    rows = units(200, 16, 0)
    rows = np.concatenate([rows, rows[:50], rows[::-1]])  # every vector at least twice
    queries = np.concatenate([units(3, 16, 1), rows[:2]])
    skip = [np.asarray([], np.int64)] * 3 + [np.asarray([0]), np.asarray([1, 201])]
    chunks = ((start, rows[start : start + chunk].copy()) for start in range(0, len(rows), chunk))
    found = nearest(chunks, queries, k, skip=skip)
    for best, query, own in zip(found, queries, skip, strict=True):
        scores = (rows.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
        order = [row for row in np.lexsort((np.arange(len(rows)), -scores)).tolist() if row not in own][:k]
        assert best.rows.tolist() == order
        assert best.scores.tolist() == scores[order].tolist()


def search(nearfar: Nearfar, *arguments: object) -> list[dict[str, Any]]:
    answer = nearfar("search", *arguments, "--json")
    assert answer.code == 0, answer.err
    found: list[dict[str, Any]] = json.loads(answer.out)["queries"]
    return found


def test_an_image_finds_itself_and_its_copy_and_a_key_finds_others(nearfar: Nearfar, place: Path, file: Path) -> None:
    image = place / "images" / "a" / "im 3.png"
    (by_image,) = search(nearfar, file, "--image", image, "-k", 3)
    assert [hit["key"] for hit in by_image["hits"]][:2] == ["a/im 3.png", "b/again.png"]
    assert [hit["label"] for hit in by_image["hits"]][:2] == ["a", "b"]
    assert by_image["hits"][0]["score"] == by_image["hits"][1]["score"] == pytest.approx(1, abs=1e-6)
    (by_key,) = search(nearfar, file, "--key", "a/im 3.png", "-k", 2)
    assert [hit["key"] for hit in by_key["hits"]] == ["b/again.png", by_image["hits"][2]["key"]]
    assert len(search(nearfar, file, "--key", "a/im 3.png", "-k", 1000)[0]["hits"]) == 41


def test_the_sheet_shows_queries_and_hits(nearfar: Nearfar, place: Path, file: Path, tmp_path: Path) -> None:
    image = place / "images" / "a" / "im 3.png"
    answer = nearfar("search", file, "--image", image, "--key", "b/im 20.png", "-k", 4, "--sheet", tmp_path / "sheet.png")
    assert answer.code == 0, answer.err
    assert f"   1  1.0000  {'a/im 3.png'}  a" in answer.out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (10 + 5 * 122, 10 + 2 * 152)
        first, second, third = (sheet.crop((10 + 122 * i, 10, 122 + 122 * i, 122)).tobytes() for i in range(3))
    assert first == second == third  # the query, itself, its copy


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("FILE",), "give --image FILE or --key KEY"),
        (("FILE", "--key", "nothing"), "no key 'nothing'"),
        (("FILE", "--image", "missing.png"), "cannot read missing.png"),
        (("FILE", "--image", "FILE"), "not an image of a known format"),
        (("FILE", "--image", "IMAGE", "--index", "annoy"), "exact, faiss"),
        (("FILE", "--image", "IMAGE", "--sheet", "sheet.jpg"), "writes a .png"),
        (("IMAGE", "--image", "IMAGE"), "cannot be read"),
        (("OTHER", "--image", "IMAGE"), "give --model MODEL"),
        (("TABLE", "--image", "IMAGE"), "no columns key and embedding"),
    ],
)
def test_mistakes_are_told(
    arguments: tuple[str, ...], told: str, nearfar: Nearfar, place: Path, file: Path, tmp_path: Path
) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(units(3, DIM, 0).reshape(-1)), DIM)
    pyarrow.parquet.write_table(pa.table({"key": list("abc"), "embedding": vectors}), tmp_path / "other.parquet")
    pyarrow.parquet.write_table(pa.table({"key": list("abc")}), tmp_path / "table.parquet")
    places = {"FILE": file, "IMAGE": place / "images" / "a" / "im 3.png"}
    places |= {"OTHER": tmp_path / "other.parquet", "TABLE": tmp_path / "table.parquet"}
    answer = nearfar("search", *(places.get(one, one) for one in arguments))
    assert answer.code == 2
    assert told in answer.err


def test_vectors_of_somebody_else_can_be_searched_with_a_model_of_their_length(
    nearfar: Nearfar, place: Path, tmp_path: Path
) -> None:
    image = place / "images" / "a" / "im 3.png"
    for dim, code in ((DIM, 0), (DIM - 1, 2)):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(units(3, dim, 0).reshape(-1)), dim)
        pyarrow.parquet.write_table(pa.table({"key": list("abc"), "embedding": vectors}), tmp_path / "other.parquet")
        answer = nearfar("search", tmp_path / "other.parquet", "--image", image, "--model", place / "model")
        assert answer.code == code
    assert "has vectors of 7 numbers, those of" in answer.err


def test_another_model_is_refused_and_a_moved_one_is_named(
    nearfar: Nearfar, place: Path, file: Path, other_model: Path
) -> None:
    image = place / "images" / "a" / "im 3.png"
    answer = nearfar("search", file, "--image", image, "--model", other_model)
    assert answer.code == 2
    assert "vectors of two models cannot be compared" in answer.err
    (place / "model").rename(place / "moved")
    try:
        answer = nearfar("search", file, "--image", image)
        assert answer.code == 2
        assert "is not there any more" in answer.err
        assert search(nearfar, file, "--image", image, "--model", place / "moved", "-k", 1)[0]["hits"][0]["label"] == "a"
        assert search(nearfar, file, "--key", "a/im 3.png", "-k", 1)[0]["hits"][0]["key"] == "b/again.png"
    finally:
        (place / "moved").rename(place / "model")


def test_faiss_finds_what_exact_search_finds_and_tells_its_recall(
    nearfar: Nearfar, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    exact = search(nearfar, file, "--key", "a/im 3.png", "-k", 5)
    for made in (True, False):
        answer = nearfar("search", file, "--key", "a/im 3.png", "-k", 5, "--index", "faiss", "--json")
        told = json.loads(answer.out)
        assert ("making" in answer.err) == made
        assert told["recall_at_10"] > 0.95
        assert [hit["key"] for hit in told["queries"][0]["hits"]] == [hit["key"] for hit in exact[0]["hits"]]
    monkeypatch.setitem(sys.modules, "faiss", None)
    answer = nearfar("search", file, "--key", "a/im 3.png", "--index", "faiss")
    assert answer.code == 2
    assert "pip install 'nearfar[faiss]'" in answer.err
