"""`nearfar mine`: the negatives of a slow loop, filters that hold, and shards that train."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.hard_negatives import Choice, Images, find_negatives, positives_of_class
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.read import Reader
from tests.conftest import Answer
from tests.pipelines.conftest import fill_classes, paint

Nearfar = Callable[..., Answer]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 3 to 9 images, one of them twice in its class and once in another."""
    folder = tmp_path_factory.mktemp("mine")
    images = fill_classes(folder / "images", {"a": 3, "b": 5, "c": 7, "d": 9})
    for place in ("a/copy.png", "b/copy.png"):
        (images / place).write_bytes((images / "a" / "im 0.png").read_bytes())
    pack(images, folder / "shards", max_shard_records=10)
    return folder / "shards"


def random_images(seed: int = 0, count: int = 120, *, raw: bool = False) -> Images:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 6)).astype(np.float32)
    if not raw:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    uid = np.arange(count) + 1000
    uid[[5, 50, 90]] = uid[7]  # the same bytes, in several groups
    vectors[[5, 50, 90]] = vectors[7]
    return Images(torch.from_numpy(vectors), rng.integers(0, 9, count), uid, raw)


def similarity(images: Images, a: int, b: int) -> float:
    """The cosine, or minus the distance of raw vectors."""
    one, other = images.vectors[[a, b]].double().numpy()
    return -float(np.linalg.norm(one - other)) if images.raw else float(one @ other)


def slow(images: Images, anchor: int, positive: int, choice: Choice) -> list[int]:
    """The nearest negatives by a loop over all images in float64."""
    own = set(images.uid[images.group == images.group[anchor]].tolist())
    seen: set[int] = set()
    ranked = []
    for row in range(len(images.uid)):
        if images.uid[row] not in seen and images.group[row] != images.group[anchor]:
            ranked.append((-similarity(images, anchor, row), row))
        seen.add(int(images.uid[row]))
    s_ap, kept = similarity(images, anchor, positive), []
    for score, row in sorted(ranked)[choice.skip : choice.depth]:
        s_an = -score
        near = choice.max_ratio is not None and s_an > choice.max_ratio * s_ap
        near = near or (choice.max_score is not None and s_an > choice.max_score)
        near = near or (choice.margin is not None and s_an > s_ap - choice.margin)
        if not near and int(images.uid[row]) not in own:
            kept.append(row)
    return kept


CHOICES = [
    Choice(),
    Choice(negatives=3, skip=2, depth=9),
    Choice(negatives=2, depth=200, max_ratio=0.95),
    Choice(negatives=8, depth=30, max_score=0.5, margin=0.1),
]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("how", ["random", "hardest", "easiest", "all"])
def test_negatives_are_those_of_a_slow_loop(choice: Choice, how: str, raw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.hard_negatives.PAIRS_A_BLOCK", 7)  # anchors fall on both sides of a cut
    images = random_images(raw=raw)
    if raw:
        choice = replace(choice, max_ratio=None, max_score=None)  # of cosines
    anchor, positive = positives_of_class(images, how, 2, 0)
    found = find_negatives(images, anchor, positive, np.arange(len(images.uid)), choice)
    expected = {}
    for a, p in zip(anchor.tolist(), positive.tolist(), strict=True):
        if kept := slow(images, a, p, choice):
            expected[a, p] = kept[: choice.negatives]
    rows = zip(found.anchor.tolist(), found.positive.tolist(), found.negatives.tolist(), strict=True)
    assert {(a, p): [n for n in negatives if n >= 0] for a, p, negatives in rows} == expected
    there = found.negatives >= 0
    exact = [
        similarity(images, a, n) for a, of in zip(found.anchor, found.negatives, strict=True) for n in of.tolist() if n >= 0
    ]
    np.testing.assert_allclose(found.s_an[there], exact, atol=1e-6)
    assert np.isnan(found.s_an[~there]).all()


@pytest.mark.parametrize("how", ["random", "hardest", "easiest", "all"])
def test_positives_are_others_of_the_class_with_other_bytes(how: str) -> None:
    images = random_images(1)
    anchor, positive = positives_of_class(images, how, 2, 0)
    scores = (images.vectors @ images.vectors.T).numpy()
    for row in range(len(images.uid)):
        others = np.flatnonzero((images.group == images.group[row]) & (images.uid != images.uid[row]))
        found = positive[anchor == row].tolist()
        assert set(found) <= set(others.tolist())
        assert len(found) == len(set(found)) == (len(others) if how == "all" else min(2, len(others)))
        nearest = -np.sort(-scores[row, others])
        if how in ("hardest", "easiest"):
            expected = nearest[-2:] if how == "hardest" else nearest[:2]
            np.testing.assert_allclose(-np.sort(-scores[row, found]), expected, atol=1e-6)


def test_random_picks_pass_the_filters_and_follow_the_seed() -> None:
    images = random_images(2)
    anchor, positive = positives_of_class(images, "random", 1, 0)
    everything = np.arange(len(images.uid))
    runs = [
        find_negatives(images, anchor, positive, everything, Choice(negatives=2, pick="random", max_ratio=0.9, seed=seed))
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0].negatives, runs[1].negatives)
    assert (runs[0].negatives != runs[2].negatives).any()
    for run in runs:
        for a, p, negatives in zip(run.anchor.tolist(), run.positive.tolist(), run.negatives.tolist(), strict=True):
            allowed = slow(images, a, p, Choice(max_ratio=0.9))
            picked = [n for n in negatives if n >= 0]
            assert set(picked) <= set(allowed)
            assert len(picked) == min(2, len(allowed))


def images_of(folder: Path) -> list[tuple[str, list[bytes], dict[str, Any]]]:
    """(key, images, groups as numbers) of every record."""
    manifest, found = Manifest.open(folder), []
    reader = Reader(manifest)
    for shard in range(len(manifest.sizes)):
        table = manifest.table(shard)
        for row, key in enumerate(manifest.keys(shard)):
            at = range(table.start[row], table.start[row + 1])
            files = [reader.read(shard, int(table.offset[i]), int(table.size[i]), int(table.crc32[i])) for i in at]
            found.append((key, files, {"group": [int(table.group[i]) for i in at]}))
    reader.close()
    return found


def test_mined_shards_hold_the_same_bytes_and_know_the_classes_and_come_out_the_same_again(
    nearfar: Nearfar, small_model: Path, shards: Path, tmp_path: Path
) -> None:
    options = ("--negatives", 2, "--per-image", 2, "--json")
    answer = nearfar("mine", small_model, shards, tmp_path / "mined", *options)
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    groups = {files[0]: about["group"][0] for _, files, about in images_of(shards)}
    copies = {files[0] for _, files, _ in images_of(shards)}
    mined = images_of(tmp_path / "mined")
    assert len(mined) == told["triplets"] == len({key for key, _, _ in mined})
    assert told["anchors"] == 26
    assert told["nothing_left"] == 0
    labels = set(Manifest.open(tmp_path / "mined").column(0, "label"))
    assert labels == {"a", "b", "c", "d"}
    twice = next(file for file in copies if sum(files[0] == file for _, files, _ in images_of(shards)) == 3)
    for _, files, about in mined:
        assert set(files) <= copies
        anchor, positive, *negatives = about["group"]
        assert anchor == positive
        assert anchor not in negatives
        for file, group in zip(files, about["group"], strict=True):
            assert file == twice or groups[file] == group
    again = nearfar("mine", small_model, shards, tmp_path / "again", *options)
    assert again.code == 0, again.err
    assert Manifest.open(tmp_path / "again").digest == Manifest.open(tmp_path / "mined").digest
    assert not list(tmp_path.glob("*.parquet*"))


def test_of_pairs_the_positives_of_other_groups_are_the_negatives(nearfar: Nearfar, small_model: Path, tmp_path: Path) -> None:
    for seed in range(12):
        paint(seed).save(tmp_path / f"{seed}.png")
    lines = ["anchor,positive,group", *(f"{2 * i}.png,{2 * i + 1}.png,{'g' if i < 3 else ''}" for i in range(6))]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    pack(tmp_path / "pairs.csv", tmp_path / "pairs", kind="pair")
    answer = nearfar("mine", small_model, tmp_path / "pairs", tmp_path / "mined", "--negatives", 8)
    assert answer.code == 0, answer.err
    name = {(tmp_path / f"{seed}.png").read_bytes(): seed for seed in range(12)}
    mined = [[name[file] for file in files] for _, files, _ in images_of(tmp_path / "mined")]
    found = {anchor: (positive, set(negatives)) for anchor, positive, *negatives in mined}
    odd = {1, 3, 5, 7, 9, 11}
    assert found == {a: (a + 1, odd - ({1, 3, 5} if a < 6 else {a + 1})) for a in range(0, 12, 2)}


def test_what_cannot_be_mined_is_refused(nearfar: Nearfar, small_model: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    for seed in range(4):
        paint(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "t.csv").write_text("anchor,positive,negative\n0.png,1.png,2.png")
    (tmp_path / "p.csv").write_text("anchor,positive,group\n0.png,1.png,g\n2.png,3.png,g")
    pack(tmp_path / "t.csv", tmp_path / "triplets", kind="triplet")
    pack(tmp_path / "p.csv", tmp_path / "pairs", kind="pair")
    out = tmp_path / "out"
    for arguments, message in [
        ((tmp_path / "triplets", out), "is of kind 'triplet'; negatives are mined for labelled and pair data"),
        ((tmp_path / "pairs", out), "holds only the class 'g'"),
        ((tmp_path / "pairs", out, "--positives", "all"), "for labelled data"),
        ((shards, tmp_path / "there"), "exists and is not empty"),
        ((shards, out, "--negatives", 9), "1 to 8"),
        ((shards, out, "--depth", 5, "--skip", 5), "raise --depth"),
        ((shards, out, "--pick", "best"), "hardest, random"),
        ((shards, out, "--positives", "first"), "random, hardest, easiest, all"),
        ((shards, out, "--max-score", -1.0), "loosen --max-score -1.0"),
    ]:
        answer = nearfar("mine", small_model, *arguments)
        assert answer.code == 2, (arguments, answer)
        assert message in answer.err, (arguments, answer)
        assert not out.exists()
    answer = nearfar("mine", small_model, shards, out)  # the last call has embedded; this one goes on from there
    assert answer.code == 0, answer.err
    assert "out.vectors.parquet is there already" in answer.err
    assert not list(tmp_path.glob("*.parquet*"))


CONFIG = """
name: second
data: {{train: "{train}", image_size: 16, batch: 8}}
encoder: {{name: convnet, dim: 8, patch: 2, widths: [8], blocks: 1, grid: 2, init: "{init}"}}
loss: {{name: triplet}}
optim: {{lr: 1.0e-3}}
train: {{steps: 2, log_every: 1}}
cluster: {{workers: 1, storage: "{storage}"}}
"""


def test_mined_triplets_train_on_from_the_model_that_mined_them(
    nearfar: Nearfar, small_model: Path, shards: Path, tmp_path: Path
) -> None:
    answer = nearfar("mine", small_model, shards, tmp_path / "mined", "--negatives", 2, "--depth", 10)
    assert answer.code == 0, answer.err
    config = tmp_path / "second.yaml"
    config.write_text(CONFIG.format(train=tmp_path / "mined", init=small_model, storage=tmp_path / "runs"))
    answer = nearfar("train", config, "--local")
    assert answer.code == 0, answer.err
    lines = (tmp_path / "runs" / "second" / "metrics.jsonl").read_text().splitlines()
    assert any("train/loss" in json.loads(line) for line in lines)
