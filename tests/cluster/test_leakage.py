"""Images that a run would train on and be judged by, and what `nearfar inspect` tells of copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cluster import leakage
from configs.load import load_config
from configs.schema import RunConfig
from pipelines.mixture import open_sources
from pipelines.pack import pack
from tests.conftest import Answer
from tests.pipelines.conftest import fill_classes, paint

Nearfar = Callable[..., Answer]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and eval: one file is in both, one again as a JPEG, one cropped, and classes are in both."""
    folder = tmp_path_factory.mktemp("sets")
    train = fill_classes(folder / "images" / "train", {"a": 6, "b": 6})
    for seed, name in ((100, "a"), (101, "a"), (102, "b"), (103, "b")):
        (folder / "images" / "eval" / name).mkdir(parents=True, exist_ok=True)
        paint(seed).save(folder / "images" / "eval" / name / f"{seed}.png")
    (folder / "images" / "eval" / "a" / "same.png").write_bytes((train / "b" / "im 1.png").read_bytes())
    with Image.open(train / "a" / "im 2.png") as image:
        image.save(folder / "images" / "eval" / "b" / "near.jpg", quality=80)
        image.crop((4, 0, 40, 28)).save(folder / "images" / "eval" / "b" / "cropped.png")
    for part in ("train", "eval"):
        pack(folder / "images" / part, folder / part)
    return folder


def config(sets: Path, folder: Path, *settings: str) -> RunConfig:
    text = (
        f"name: x\ndata: {{train: {sets / 'train'}, eval: {sets / 'eval'}, image_size: 16, batch: 4, per_class: 2}}\n"
        "encoder: {name: convnet, dim: 8, patch: 2, widths: [8], blocks: 1, grid: 2}\nloss: {name: sup_con}\n"
        f"optim: {{lr: 1e-3, warmup_steps: 0}}\ntrain: {{steps: 1}}\n"
        f"cluster: {{workers: 1, storage: {folder / 'runs'}}}\ntracking: {{enabled: false}}\n"
    )
    (folder / "run.yaml").write_text(text)
    return load_config(folder / "run.yaml", settings)


def checked(run: RunConfig, folder: Path) -> dict[str, Any] | None:
    leakage.check_run(run, open_sources(run.data.train), folder)
    path = folder / leakage.FILE
    return json.loads(path.read_text()) if path.exists() else None


def names(pairs: list[dict[str, Any]], side: str) -> list[str]:
    return [pair[side].partition("-")[2] for pair in pairs]


def test_a_run_is_told_which_images_it_is_judged_by_are_trained_on(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = checked(config(sets, tmp_path), tmp_path)
    assert found is not None
    assert [pair["kind"] for pair in found["pairs"]] == ["same", "near"]
    assert (names(found["pairs"], "eval"), names(found["pairs"], "train")) == (["same", "near"], ["im-1", "im-2"])
    assert found["pairs"][0]["score"] == 1
    assert 0.8 < found["pairs"][1]["score"] <= 1
    assert found["counts"] == {"same": 1, "near": 1, "encoder": 0}
    assert "2 of 7 images of data.eval are in data.train too (1 the same, 1 nearly)" in " ".join(
        capsys.readouterr().err.split()
    )


def test_large_sets_are_compared_by_their_manifests_only(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "FEW_SECONDS", 0)
    found = checked(config(sets, tmp_path), tmp_path)
    assert found is not None
    assert names(found["pairs"], "eval") == ["same"]
    assert found["checked"] == {"bytes": True}
    found = checked(config(sets, tmp_path, "data.check_duplicates=true"), tmp_path)
    assert found is not None
    assert found["counts"]["near"] == 1
    monkeypatch.setattr(leakage, "MOST_UIDS", 0)
    (tmp_path / leakage.FILE).unlink()
    assert checked(config(sets, tmp_path), tmp_path) is None


def test_it_can_be_left_out_and_clean_data_is_quiet(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(config(sets, tmp_path, "data.check_duplicates=false"), tmp_path) is None
    for seed, name in ((200, "a"), (201, "b")):
        (tmp_path / "clean" / name).mkdir(parents=True)
        paint(seed).save(tmp_path / "clean" / name / "x.png")
    pack(tmp_path / "clean", tmp_path / "shards")
    found = checked(config(sets, tmp_path, f"data.eval={tmp_path / 'shards'}"), tmp_path)
    assert found is not None
    assert found["pairs"] == []
    assert capsys.readouterr().err == ""


def test_several_sources_are_all_looked_at(sets: Path, tmp_path: Path) -> None:
    fill_classes(tmp_path / "more", {"c": 30, "d": 3})
    pack(tmp_path / "more", tmp_path / "shards", max_shard_records=9)
    both = f"data.train=[{{path: {tmp_path / 'shards'}}}, {{path: {sets / 'train'}}}]"
    found = checked(config(sets, tmp_path, both), tmp_path)
    assert found is not None
    assert found["counts"] == {"same": 1, "near": 1, "encoder": 0}


def test_inspect_tells_copies_in_another_set_and_draws_them(
    nearfar: Nearfar, sets: Path, small_model: Path, tmp_path: Path
) -> None:
    sheet = tmp_path / "sheet.png"
    answer = nearfar("inspect", sets / "eval", "--against", sets / "train", "--sheet", sheet)
    assert answer.code == 0, answer.err
    assert f"2 of 7 images of {sets / 'eval'} are in {sets / 'train'}, too: 1 same, 1 near" in answer.out
    with Image.open(sheet) as image:
        assert image.size == (10 + 4 * 122, 10 + 152)
    options = ("--against", sets / "train", "--model", small_model, "--threshold", 0, "--distance", 0, "--json")
    found = json.loads(nearfar("inspect", sets / "eval", *options).out)
    assert found["matched"] == 7  # whatever it is, something is nearest
    assert found["checked"]["threshold"] == 0
    scores = {pair["image"].partition("-")[2]: pair["score"] for pair in found["pairs"] if pair["kind"] == "encoder"}
    assert max(scores.values()) <= 1
    strict = (*options[:4], "--threshold", 0.9999, "--distance", 0, "--json")
    assert json.loads(nearfar("inspect", sets / "eval", *strict).out)["matched"] < 7


def test_inspect_tells_images_that_are_in_two_classes(nearfar: Nearfar, tmp_path: Path) -> None:
    source = fill_classes(tmp_path / "images", {"a": 3, "b": 3})
    for name in ("a/twice.png", "b/wrong.png"):
        (source / name).write_bytes((source / "a" / "im 0.png").read_bytes())
    pack(source, tmp_path / "shards")
    found = json.loads(nearfar("inspect", tmp_path / "shards", "--duplicates", "--json").out)
    assert found["counts"]["same"] in (1, 2)  # the wrong one with the first of them, or both of them with it
    assert all("wrong" in f"{pair['image']} {pair['other']}" for pair in found["pairs"])
    answer = nearfar("inspect", tmp_path / "shards", "--duplicates")
    assert "are in another class of it, too" in answer.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "x"), "are for --against SHARDS or --duplicates"),
        (("--against", "nowhere"), "no folder 'nowhere'"),
        (("--duplicates", "--threshold", "0.9"), "give --model MODEL with it"),
        (("--against", "SETS", "--duplicates"), "exclude each other"),
        (("--duplicates", "--sheet", "x.jpg"), "writes a .png"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], told: str, nearfar: Nearfar, sets: Path) -> None:
    answer = nearfar("inspect", sets / "eval", *(str(sets / "train") if one == "SETS" else one for one in arguments))
    assert answer.code == 2
    assert told in answer.err
