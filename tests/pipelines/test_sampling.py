"""Pairs and triplets drawn from labelled images hold what their kind says, whatever the source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from pipelines.manifest import Manifest
from pipelines.nearby import neighbour_pairs
from pipelines.pack import pack
from pipelines.read import Reader
from pipelines.sampling import NEAREST, Classes, labelled_pairs, other_classes, pairs, triplets
from pipelines.sources.sampled import Sample
from pipelines.text_vectors import lsa, read_texts, write_vectors
from pipelines.vectors import decode_vector
from tests.pipelines.streams import settings

Painter = Callable[..., Image.Image]
CODES = np.asarray([2, 0, 1, 2, 0, 2, 3, 1, 2, 0])  # class 3 has one image


def test_positives_are_others_of_the_class_and_negatives_are_of_another() -> None:
    for rows in (pairs(CODES, 50, 1), triplets(CODES, 50, 1)):
        anchor, positive = rows[:, 0], rows[:, 1]
        assert sorted(set(anchor.tolist())) == [0, 1, 2, 3, 4, 5, 7, 8, 9]
        assert (np.bincount(anchor)[[0, 1, 2]] == 50).all()
        assert (CODES[anchor] == CODES[positive]).all()
        assert (anchor != positive).all()
    negative = triplets(CODES, 50, 1)[:, 2]
    assert (CODES[negative] != CODES[triplets(CODES, 50, 1)[:, 0]]).all()
    assert set(negative.tolist()) == set(range(10))  # the lonely one, too


def test_draws_are_even() -> None:
    rows = triplets(CODES, 6000, 3)
    of_first = rows[rows[:, 0] == 0]
    assert np.bincount(of_first[:, 1], minlength=10)[[3, 5, 8]] == pytest.approx(2000, rel=0.1)
    others = np.flatnonzero(CODES != 2)
    assert np.bincount(of_first[:, 2], minlength=10)[others] == pytest.approx(6000 / len(others), rel=0.15)


def test_labelled_pairs_match_as_often_as_not() -> None:
    rows, match = labelled_pairs(CODES, 3, 5)
    assert match.mean() == 0.5
    assert ((CODES[rows[:, 0]] == CODES[rows[:, 1]]) == (match == 1)).all()
    assert not np.array_equal(rows, labelled_pairs(CODES, 3, 6)[0])
    assert np.array_equal(rows, labelled_pairs(CODES, 3, 5)[0])


def test_near_and_far_classes_are_so_by_their_vectors() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    codes = np.repeat(np.arange(60), 40)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    place = np.argsort(np.argsort(-(unit @ unit.T + 9 * np.eye(60)), axis=1), axis=1)  # 0 is the class itself
    for how, low, high in (("near", 1, NEAREST), ("far", 31, 59), ("random", 1, 59)):
        drawn = place[codes, other_classes(vectors, codes, how, 2)]
        assert drawn.min() >= low
        assert drawn.max() <= high
        assert len(np.unique(drawn)) == pytest.approx(high - low + 1, abs=1)


def test_neighbours_are_the_nearest_and_the_others_are_not() -> None:
    vectors = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    rows, match = neighbour_pairs(vectors, 5, 3)
    distance = ((vectors[:, None].astype(np.float64) - vectors[None]) ** 2).sum(2)
    place = np.argsort(np.argsort(distance, axis=1), axis=1)[rows[:, 0], rows[:, 1]]  # 0 is the image itself
    assert sorted(set(place[match == 1].tolist())) == [1, 2, 3, 4, 5]
    assert place[match == 0].min() > 5
    assert len(np.unique(place[match == 0])) > 25
    with pytest.raises(ValueError, match="too few to have as many"):
        neighbour_pairs(vectors[:10], 5, 3)


def test_a_limit_takes_some_of_each_class() -> None:
    few = Classes(CODES).few(2, 0)
    assert np.bincount(CODES[few]).tolist() == [2, 2, 2, 1]
    assert any(not np.array_equal(few, Classes(CODES).few(2, seed)) for seed in (1, 2, 3))


@pytest.fixture
def labelled(tmp_path: Path, painter: Painter) -> Path:
    """Shards of four classes of three images."""
    for number in range(12):
        folder = tmp_path / "images" / f"class {number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        painter(number).save(folder / f"{number}.png")
    pack(tmp_path / "images", tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    rows = [{"label": f"class {i}", "embedding": np.eye(4)[i].tolist()} for i in range(4)]
    path = tmp_path / "vectors.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_triplets_of_packed_classes_keep_their_names(labelled: Path, tmp_path: Path) -> None:
    pack(labelled, tmp_path / "out", kind="triplet", sample=Sample("random", per_image=2))
    manifest = Manifest.open(tmp_path / "out")
    assert (manifest.kind, manifest.num_samples, manifest.num_images) == ("triplet", 24, 72)
    table, groups = manifest.table(0), Manifest.open(labelled).class_names
    group = table.group.reshape(-1, 3)
    assert (group[:, 0] == group[:, 1]).all()
    assert (group[:, 0] != group[:, 2]).all()
    assert set(group.reshape(-1).tolist()) == set(groups)  # the same things as in the labelled data
    uid = table.uid.reshape(-1, 3)
    assert (uid[:, 0] != uid[:, 1]).all()


def test_the_vector_of_the_class_takes_the_place_of_the_positive(labelled: Path, vectors: Path, tmp_path: Path) -> None:
    names = Manifest.open(labelled).class_names
    for kind, strategy in (("pair", "random"), ("triplet", "far"), ("labelled_pair", "random")):
        out = tmp_path / kind
        pack(labelled, out, kind=kind, sample=Sample(strategy, vectors=str(vectors)))
        manifest = Manifest.open(out)
        table = manifest.table(0)
        with_reader = Reader(manifest, settings())
        for record in range(manifest.num_samples):
            members = range(int(table.start[record]), int(table.start[record + 1]))
            own = int(names[int(table.group[members[0]])].removeprefix("class "))
            given = [
                decode_vector(with_reader.read(0, int(table.offset[m]), int(table.size[m]), int(table.crc32[m]))).tolist()
                for m in members
                if table.dim[m]
            ]
            mine = np.eye(4)[own].tolist()
            if kind == "pair":
                assert given == [mine, mine]  # the positive and the target
            elif kind == "triplet":
                assert given[0] == mine
                assert given[1] != mine
            else:
                assert (given == [mine]) == bool(table.match[record])
        with_reader.close()


def test_targets_are_joined_by_key_and_what_has_none_is_left_out(labelled: Path, tmp_path: Path) -> None:
    manifest = Manifest.open(labelled)
    keys = manifest.keys(0)
    rows = [{"key": key, "embedding": [float(number), 1.0]} for number, key in enumerate(keys) if number != 5]
    (tmp_path / "of_images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = pack(labelled, tmp_path / "out", sample=Sample(vectors=str(tmp_path / "of_images.jsonl")))
    made = Manifest.open(tmp_path / "out")
    assert (made.num_samples, made.target_dim) == (11, 2)
    assert [name for name, _ in summary.rejected] == [f"000000.tar/{keys[5]}.png"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("triplet", {"strategy": "near"}, "--sample near goes by vectors"),
        ("pair", {"strategy": "relevance"}, "--sample relevance is not for --kind pair"),
        ("labelled", {"strategy": "random"}, "it is for pair, labelled_pair and triplet"),
        ("pair", {"limit": 3}, "say how to draw"),
        ("labelled", {"per_image": 4}, "--per-image is for pairs and triplets"),
        ("pair", {"strategy": "random", "vectors": "nowhere.parquet"}, "no file 'nowhere.parquet'"),
        ("pair", {"strategy": "random", "per_image": 0}, "--per-image must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    labelled: Path, tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack(labelled, tmp_path / "out", kind=kind, sample=Sample(**options))
    assert not (tmp_path / "out").exists()


def test_vectors_of_other_labels_are_refused(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text('{"label": "dog", "embedding": [1.0]}\n')
    with pytest.raises(ValueError, match="no vector for 12 of 12 images, by label: 'class 0'"):
        pack(labelled, tmp_path / "out", kind="pair", sample=Sample("random", vectors=str(tmp_path / "v.jsonl")))


@pytest.mark.parametrize("strategy", ["random", "near", "far"])
def test_vectors_of_one_class_alone_are_refused(labelled: Path, tmp_path: Path, strategy: str) -> None:
    images = tmp_path / "two"
    for name in ("class 0", "class 1"):
        shutil.copytree(tmp_path / "images" / name, images / name)
    (tmp_path / "v.jsonl").write_text('{"label": "class 0", "embedding": [1.0]}\n')
    with pytest.raises(ValueError, match="only the class 'class 0' has a vector"):
        pack(images, tmp_path / "out", kind="triplet", sample=Sample(strategy, vectors=str(tmp_path / "v.jsonl")))


def test_images_of_a_folder_are_known_by_their_whole_name(tmp_path: Path, painter: Painter) -> None:
    for number, place in enumerate(("a/0.png", "a/1.png", "b/0.png", "b/1.png")):
        path = tmp_path / "images" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        painter(number).save(path)
    rows = [{"key": f"{name}/{i}.png", "embedding": [float(i), float(name == "b")]} for name in "ab" for i in (0, 1)]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = pack(tmp_path / "images", tmp_path / "out", sample=Sample(vectors=str(tmp_path / "v.jsonl")))
    assert (summary.images, summary.rejected) == (4, [])
    (tmp_path / "v.jsonl").write_text("\n".join(json.dumps({"key": str(i), "embedding": [1.0]}) for i in (0, 1)))
    with pytest.raises(ValueError, match="no vector for 4 of 4 images, by key"):
        pack(tmp_path / "images", tmp_path / "other", sample=Sample(vectors=str(tmp_path / "v.jsonl")))


def test_labels_of_texts_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("label,text\n0,zero\n007,seven\n1,one\n")
    assert read_texts(str(tmp_path / "texts.csv")).labels == ["0", "007", "1"]


def test_drawing_over_the_border_of_a_split_is_refused(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pack the labelled images with --eval-fraction first"):
        pack(labelled, tmp_path / "out", kind="triplet", eval_fraction=0.5, sample=Sample("random"))


def test_texts_that_share_words_have_near_vectors(tmp_path: Path) -> None:
    texts = ["red_cat animal", "black cat animal", "dog animal", "red car vehicle", "blue car vehicle", "lorry vehicle"]
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"label": str(i), "text": text}) for i, text in enumerate(texts))
    )
    read = read_texts(str(tmp_path / "texts.jsonl"))
    found = lsa(read.texts, 3)
    near = found @ found.T
    assert near[:3, :3].min() > near[:3, 3:].max()
    write_vectors(str(tmp_path / "v.parquet"), read, found)
    with pytest.raises(ValueError, match="is there already"):
        write_vectors(str(tmp_path / "v.parquet"), read, found)
    with pytest.raises(ValueError, match="give at most 5"):
        lsa(texts, 6)


@pytest.mark.parametrize("strategy", ["random", "neighbours"])
def test_images_in_a_parquet_table_give_the_pairs_of_the_same_images_in_a_folder(
    labelled: Path, tmp_path: Path, strategy: str
) -> None:
    files = sorted((tmp_path / "images").rglob("*.png"))
    columns = {"image": [file.read_bytes() for file in files], "label": [file.parent.name for file in files]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    sample = Sample(strategy, per_image=2)
    tables = []
    for number, source in enumerate((tmp_path / "images", tmp_path / "t.parquet")):
        pack(source, tmp_path / f"out{number}", kind="labelled_pair", sample=sample)
        tables.append(Manifest.open(tmp_path / f"out{number}").table(0))
    assert np.array_equal(tables[0].uid, tables[1].uid)
    assert np.array_equal(tables[0].match, tables[1].match)
