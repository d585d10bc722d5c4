"""What a new user gets wrong: one clear message, exit code 2, nothing half-written."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import Answer

Nearfar = Callable[..., Answer]


def classes(folder: Path, *names: str, images: int = 3) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (20, 20), (40 * i, len(name) * 9 % 255, 90)).save(folder / name / f"{i}.png")
    return folder


def assert_refused(answer: Answer, *words: str) -> None:
    assert answer.code == 2, answer
    assert answer.out == ""
    assert "Traceback" not in answer.err
    for word in words:
        assert word in answer.err, answer.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "{tmp}/nothing", "{tmp}/out"], ["nothing"]),
        (["pack", "{tmp}/one/only", "{tmp}/out"], ["class"]),
        (["pack", "{tmp}/one", "{tmp}/out"], ["class"]),
        (["pack", "{tmp}/empty", "{tmp}/out"], []),
        (["pack", "{tmp}/two", "{tmp}/out", "--kind", "labeled"], ["labelled"]),
        (["pack", "{tmp}/two", "{tmp}/out", "--split", "clas"], ["class"]),
        (["pack", "{tmp}/two", "{tmp}/out", "--eval-fraction", "2"], ["eval-fraction"]),
        (["pack", "{tmp}/two"], ["OUT"]),
        (["pack", "{tmp}/two", "{tmp}/out", "--colour", "blue"], ["--colour"]),
        (["fetch", "emojis", "{tmp}/out"], ["did you mean 'emoji'"]),
        (["demo", "--data", "emojis", "--out", "{tmp}/out"], ["did you mean 'emoji'"]),
        (["check", "{tmp}/none.yaml"], ["none.yaml"]),
        (["recipes", "emojy"], ["did you mean 'emoji'"]),
        (["ui", "{tmp}"], ["mlflow.db"]),
        (["report", "{tmp}"], ["config.yaml"]),
        (["track", "sync", "{tmp}"], ["config.yaml"]),
        (["track", "synch", "{tmp}"], ["synch"]),
        (["launch"], ["launch"]),
    ],
)
def test_wrong_arguments(nearfar: Nearfar, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    classes(tmp_path / "one", "only")
    classes(tmp_path / "two", "first", "second")
    classes(tmp_path / "empty", "first", "second", images=0)
    assert_refused(nearfar(*(a.replace("{tmp}", str(tmp_path)) for a in arguments)), *words)
    assert not (tmp_path / "out").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two", "empty"}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.train=/nowhere", ["data.train", "/nowhere"]),
        ("data.eval=/nowhere", ["data.eval", "/nowhere"]),
        ("data.batch=100000", ["data.batch"]),
        ("data.batch=2", ["one class"]),
        ("data.per_class=64", ["per_class"]),
        ("data.bach=3", ["did you mean 'batch'"]),
        ("loss.0.name=tripplet", ["did you mean 'triplet'"]),
        ("loss.0.temprature=1", ["did you mean 'temperature'"]),
        ("loss.7.name=triplet", ["2 entries"]),
        ("loss={name: regress}", ["regress", "target"]),
        ("loss={name: cosine_embedding}", ["cosine_embedding on labelled data", "pairs"]),
        ("encoder.name=convnets", ["did you mean 'convnet'"]),
        ("encoder.grid=50", ["grid"]),
        ("optim.name=adam", ["did you mean 'adamw'"]),
        ("optim.warmup_steps=50", ["warmup_steps"]),
        ("optim={schedule: step, milestones: [60]}", ["optim.milestones", "50 steps"]),
        ("train.early_stop={metric: recall}", ["early_stop.metric", "recall_at_1"]),
        ("encoder.init=/nowhere", ["encoder.init", "/nowhere"]),
        ("encoder.freeze=[bodi]", ["encoder.freeze", "bodi"]),
        ("encoder={name: transformers, path: /nowhere}", ["transformers"]),
        ("train.steps=0", ["train.steps"]),
        ("train.reproducible=true", ["reproducible", "train.micro_batch"]),
        ("train={steps: 50, reproducible: true, micro_batch: 4, precision: fp64}", ["reproducible", "fp64", "fp32"]),
        ("train={steps: 50, reproducible: true, micro_batch: 32}", ["cluster.workers 2", "train.micro_batch 32"]),
        ("tracking.uri=file:///tmp/x", ["tracking.uri"]),
        ("tracking.promote.metric=recall", ["recall_at_1"]),
        ("tracking.register=a/b", ["tracking.register"]),
        ("tracking.uri=sqlite:x", ["tracking.uri", "sqlite:///FILE"]),
        ("tracking.uri=sqlite:////proc/none/x.db", ["tracking.uri", "/proc"]),
        ("tracking.promote.alias=a b", ["tracking.promote.alias"]),
        ("cluster.checkpoints=nosuch://bucket/x", ["cluster.checkpoints", "nosuch"]),
        ("cluster.storage=/proc/none/x", ["cluster.storage", "/proc"]),
        ("cluster.storage={config}/below", ["cluster.storage", "is a file"]),
        ("encoder.dim=1000000000", ["encoder.dim", "65536"]),
        ("encoder={name: convnet, grid: 1, widths: [8192], blocks: 200}", ["encoder.widths", "encoder.blocks", "weights"]),
        ("data.max_pixels=1", ["data.train", "none of the first", "data.max_pixels"]),
        ("data.timeout_s=1e-9", ["data.timeout_s"]),
        ("loss={name: arcface, dim: 5}", ["loss.dim", "16"]),
        ("loss={name: arcface, num_classes: 3}", ["loss.num_classes", "10"]),
        ("loss={name: info_nce, temperature: 1.0e-300}", ["loss.temperature", "not finite"]),
        ("loss={name: info_nce, matryoshka: 5}", ["loss.matryoshka", "list"]),
        ("loss.0.weight=.nan", ["loss.weight", "finite"]),
        ("loss={name: 'os:getcwd'}", ["loss.name", "makes a str"]),
        ("encoder={name: 'os:getcwd'}", ["encoder.name", "image_size"]),
        ("optim.name=os:getcwd", ["optim.name"]),
        ("name=a b", ["name"]),
    ],
)
@pytest.mark.parametrize("command", ["check", "train"])
def test_wrong_settings(
    nearfar: Nearfar, config_file: Path, digits: Path, tmp_path: Path, command: str, setting: str, words: list[str]
) -> None:
    setting = setting.replace("{config}", str(config_file)).replace("{shards}", str(digits))
    local = ["--local"] if command == "train" else []
    assert_refused(nearfar(command, config_file, *local, "--set", setting), *words)
    assert not (tmp_path / "runs").exists()


def test_centres_spread_over_workers_cannot_be_reproducible(nearfar: Nearfar, config_file: Path) -> None:
    settings = ["train={steps: 50, reproducible: true, micro_batch: 4}", "loss={name: arcface, shard: true}"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert_refused(nearfar("check", config_file, *arguments), "loss.shard", "train.reproducible")


def test_activations_that_no_machine_can_hold(nearfar: Nearfar, config_file: Path) -> None:
    settings = ["data.image_size=2048", "data.batch=1024", "encoder={name: convnet, patch: 1, widths: [512], blocks: 1}"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert_refused(nearfar("check", config_file, *arguments), "data.image_size", "data.batch", "GB", "train.micro_batch")


def test_gpus_where_there_are_none(nearfar: Nearfar, config_file: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert nearfar("check", config_file, "--set", "cluster.gpus_per_worker=1").code == 0  # it may be for another machine
    for local in (["--local"], []):
        assert_refused(nearfar("train", config_file, *local, "--set", "cluster.gpus_per_worker=1"), "GPU")
    assert not (tmp_path / "runs").exists()


def test_a_run_name_that_is_taken(nearfar: Nearfar, config_file: Path, tmp_path: Path) -> None:
    quick = ["--local", "--set", "train.steps=6", "--set", "cluster.workers=1", "--set", "tracking.enabled=false"]
    assert nearfar("train", config_file, *quick).code == 0
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*"))
    assert_refused(nearfar("train", config_file, *quick), "small", "--resume")
    assert_refused(nearfar("train", config_file, *quick, "--resume", "--set", "optim.lr=0.5"), "optim.lr: 0.001 -> 0.5")
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")) == before


def test_a_run_is_not_resumed_on_other_data(nearfar: Nearfar, config_file: Path, digits: Path, tmp_path: Path) -> None:
    quick = ["--local", "--set", "cluster.workers=1", "--set", "tracking.enabled=false", "--set", "train.steps=6"]
    assert nearfar("train", config_file, *quick).code == 0
    (tmp_path / "runs" / "small" / "result.json").unlink()  # as after a kill at the very end
    answer = nearfar("train", config_file, *quick, "--resume", "--set", f"data.train={digits}/eval")
    assert_refused(answer, "digest")


def test_a_port_that_is_taken(nearfar: Nearfar, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(nearfar("ui", tmp_path, "--port", port), str(port), "--port")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_no_space_for_the_shards(nearfar: Nearfar, tmp_path: Path, small_disk: Path) -> None:
    source = tmp_path / "noise"
    for name in ("a", "b"):
        (source / name).mkdir(parents=True)
        for i in range(8):
            Image.effect_noise((300, 300), 90).save(source / name / f"{i}.png")
    assert_refused(nearfar("pack", source, small_disk / "out"), "space", "the same command goes on", "out.partial")
    assert [path.name for path in small_disk.iterdir()] == ["out.partial"]


def test_no_space_for_the_checkpoints(nearfar: Nearfar, config_file: Path, small_disk: Path) -> None:
    answer = nearfar(
        "train", config_file, "--local", "--set", f"cluster.storage={small_disk}/runs", "--set", "encoder.widths=[64,128]"
    )
    assert_refused(answer, "cluster.storage", "free")
    assert list(small_disk.iterdir()) == []
