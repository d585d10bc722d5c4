"""Runs over several sources, and over data that grows: what is trained, what is refused, and what MLflow is told."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.resume import histories_of
from cluster.runfolder import RunFolder, read_lines
from configs.load import load_config
from pipelines.manifest import Manifest
from pipelines.mixture import open_sources
from pipelines.pack import pack
from pipelines.stream import units_per_epoch
from tests.conftest import Answer
from tests.integration.test_mistakes import assert_refused
from tests.pipelines.streams import write_manifest, write_union

Nearfar = Callable[..., Answer]


def settings(**values: object) -> list[str]:
    """Quick, in this process, a checkpoint at every step."""
    quick: dict[str, object] = {"cluster.workers": 1, "loss": "{name: info_nce}", "train.momentum": 0, "data.eval": "null"}
    quick |= {"optim.warmup_steps": 0, "train.checkpoint_every": 1, "train.keep": 20}
    quick |= {"data.image_size": 8, "encoder.widths": [8], **values}
    return ["--local", *(word for key, value in quick.items() for word in ("--set", f"{key}={value}"))]


@pytest.fixture
def growing(digits: Path, tmp_path: Path) -> Callable[[int], Path]:
    """A folder that holds one shard of digits, then two, then three."""
    small, more = (Manifest.open(digits / name) for name in ("eval", "train"))
    folder = tmp_path / "growing"

    def grow(num_shards: int) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        write_union(folder, [small, more, small][:num_shards])
        return folder

    return grow


def stop_after(run: Path, step: int) -> None:
    """As if the run had been killed there."""
    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["step"] <= step]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in read_lines(run / "metrics.jsonl") if "train/loss" in row]


def stages(run: Path, step: int) -> Any:
    state = json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
    return [source["stages"] for source in state["sources"]]


def test_a_run_goes_on_over_data_that_has_grown(
    nearfar: Nearfar,
    config_file: Path,
    digits: Path,
    growing: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, run = growing(1), tmp_path / "runs" / "small"
    given: dict[str, object] = {"data.train": folder, "data.batch": 128, "train.steps": "null", "train.epochs": 2.5}
    train = ["train", config_file, *settings(**given, **{"tracking.enabled": "false"})]
    assert nearfar(*train).code == 0
    units = units_per_epoch(Manifest.open(folder), load_config(config_file).data)
    steps = math.ceil(2.5 * units / 64)
    assert 128 < units < 192  # the border is inside the third batch
    reference = losses(run)
    assert (stages(run, steps), len(reference)) == ([[[0, 0, 1]]], steps)
    stop_after(run, 1)

    for change, word in (("seed=4", "seed: 3 -> 4"), ("data.lanes=8", "data.lanes: 64 -> 8"), ("data.window=9", "data.window")):
        assert_refused(nearfar(*train, "--resume", "--set", change), word)
    with monkeypatch.context() as patch:
        patch.setattr("cluster.resume.ORDER_VERSION", 2)
        assert_refused(nearfar(*train, "--resume"), "order_version: 1 -> 2")

    growing(2)
    assert_refused(nearfar(*train, "--resume"), "grown from 1 to 2 shards", "--accept-new-data")
    assert_refused(nearfar(*train, "--accept-new-data", "--set", "name=other"), "--resume")
    centres = ["--set", "loss={name: arcface}"]
    assert_refused(nearfar(*train, *centres, "--resume", "--accept-new-data"), "loss")  # another loss is another run
    answer = nearfar(*train, "--resume", "--accept-new-data")
    assert answer.code == 0, answer
    assert stages(run, steps) == [[[0, 0, 1], [units, 1, 2]]]
    assert losses(run)[:2] == pytest.approx(reference[:2], rel=1e-9)
    assert losses(run)[2] != pytest.approx(reference[2], rel=1e-3)

    stop_after(run, 6)
    growing(3)  # no leave is needed for what was accepted, but for what has come since
    assert_refused(nearfar(*train, "--resume"), "grown from 2 to 3 shards")
    again = histories_of(RunFolder(run).config(), RunFolder(run), Manifest.open(growing(2)))
    assert [[[s.first, s.first_epoch, s.num_shards] for s in again[0].stages]] == stages(run, 6)
    shutil.rmtree(folder)
    write_union(folder, 2 * [Manifest.open(digits / "train")])
    assert_refused(nearfar(*train, "--resume", "--accept-new-data"), "other data", "digest")


def test_new_classes_are_refused_where_a_loss_has_a_centre_for_each(
    nearfar: Nearfar, config_file: Path, tmp_path: Path, digits: Path
) -> None:
    (tmp_path / "images").mkdir()
    for name in ("0", "1"):
        shutil.copytree(digits.parent / "images" / name, tmp_path / "images" / name)
    pack(tmp_path / "images", tmp_path / "first")
    write_union(tmp_path / "growing", [Manifest.open(tmp_path / "first")])
    given: dict[str, object] = {"data.train": tmp_path / "growing", "train.steps": 3, "loss": "{name: arcface}"}
    train = ["train", config_file, *settings(**given, **{"tracking.enabled": "false"})]
    assert nearfar(*train).code == 0
    stop_after(tmp_path / "runs" / "small", 1)
    shutil.rmtree(tmp_path / "growing")
    write_union(tmp_path / "growing", [Manifest.open(tmp_path / "first"), Manifest.open(digits / "train")])
    assert_refused(nearfar(*train, "--resume", "--accept-new-data"), "more classes", "'arcface'")


def test_a_run_over_two_sources_tells_mlflow_of_both(nearfar: Nearfar, config_file: Path, digits: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    def listed(second: str) -> str:
        return f"data.train=[{{path: {digits}/train, weight: 3}}, {second}]"

    quick = settings(**{"train.steps": 3})
    write_manifest(tmp_path / "pairs", "pair", [[None] * 9])
    assert_refused(nearfar("check", config_file, "--set", listed(f"{{path: {tmp_path}/pairs}}")), "data.train", "one kind")
    assert_refused(nearfar("check", config_file, "--set", listed("{path: x, wieght: 1}")), "did you mean 'weight'")
    two = listed(f"{{path: {digits}/eval}}")
    answer = nearfar("train", config_file, *quick, "--set", two, "--json")
    assert answer.code == 0, answer
    result = json.loads(answer.out)
    run_id = json.loads((Path(result["run"]) / "tracking.json").read_text())["run_id"]
    run = MlflowClient(result["tracking_uri"]).get_run(run_id)
    training = [
        given.dataset.digest for given in run.inputs.dataset_inputs if any(tag.value == "training" for tag in given.tags)
    ]
    parts = [Manifest.open(digits / name) for name in ("train", "eval")]
    assert sorted(training) == sorted(part.digest[:36] for part in parts)
    assert run.data.params["data.train.0.weight"] == "3.0"
    folder = RunFolder(Path(result["run"]))
    (folder.path / "result.json").unlink()
    elsewhere = [f"data.train=[{{path: {tmp_path}/moved, weight: 6}}, {{path: {digits}/eval, weight: 2}}]", "data.eval=null"]
    shutil.copytree(digits / "train", tmp_path / "moved")
    moved = load_config(folder.path / "config.yaml", elsewhere)
    assert len(histories_of(moved, folder, open_sources(moved.data.train))) == 2  # the same shares, from elsewhere
    other = two.replace("weight: 3", "weight: 4")
    assert_refused(nearfar("train", config_file, *quick, "--resume", "--set", other), "data.train", "'share'")
