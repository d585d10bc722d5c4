"""`nearfar train` on a GPU: every precision and every way to save time or memory."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.runfolder import read_lines
from tests.conftest import Answer
from tests.gpu.card import needs_card
from tests.gpu.conftest import ON_CARD
from tests.runs import assert_equal, curve, train

pytestmark = needs_card
WAYS = {
    "micro-batch": ["train.micro_batch=8"],
    "checkpointing": ["encoder.checkpointing=true"],
    "channels-last": ["train.channels_last=true"],
    "compiled": ["train.compile=true"],
}
SIMPLE = ["loss={name: info_nce, temperature: 0.1}", "train.momentum=0"]  # a loss that can be compared from step to step
REPRODUCIBLE = ["train.reproducible=true", "train.micro_batch=8"]


def assert_close(found: dict[str, Any], expected: dict[str, Any], *, within: float) -> None:
    """Every step exactly once, and all that was logged of it."""
    rows, others = curve(expected["run"]), curve(found["run"])
    assert [row["step"] for row in others] == [row["step"] for row in rows] == list(range(expected["steps"] + 1))
    worst = (0.0, 0, "")
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        worst = max(worst, *((abs(other[k] - v) / max(abs(v), 1e-6), row["step"], k) for k, v in row.items()))
    print(f"\n{found['name']}: relative difference at most {worst}")
    assert worst[0] < within


def learned(run: str) -> tuple[float, float]:
    """The mean loss of the first and of the last ten steps."""
    losses = [row["train/loss"] for row in curve(run) if "train/loss" in row]
    return statistics.mean(losses[:10]), statistics.mean(losses[-10:])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns_in_every_precision(config: Path, precision: str) -> None:
    found = train(config, precision, ON_CARD, *SIMPLE, f"train.precision={precision}")
    first, last = learned(found["run"])
    assert last < 0.9 * first
    assert found["metrics"]["recall_at_1"] > found["before"]["recall_at_1"] + 0.05
    rows = list(read_lines(Path(found["run"]) / "metrics.jsonl"))
    assert all(row["system/gpu_memory_allocated_megabytes"] > 0 for row in rows if "train/loss" in row)
    (attempt,) = read_lines(Path(found["run"]) / "attempts.jsonl")
    assert attempt["device"].startswith("cuda")


def test_float64_gives_the_curve_of_the_cpu(config: Path, plain: dict[str, Any]) -> None:
    assert_close(plain, train(config, "cpu"), within=1e-8)


@pytest.mark.parametrize("way", WAYS)
def test_saving_time_or_memory_changes_nothing(config: Path, plain: dict[str, Any], way: str) -> None:
    assert_close(train(config, way, ON_CARD, *WAYS[way]), plain, within=1e-8)


def test_all_ways_go_together(config: Path) -> None:
    ways = [setting for way in WAYS.values() for setting in way]
    found = train(
        config,
        "together",
        ON_CARD,
        *SIMPLE,
        *ways,
        "train.precision=bf16",
        "data.augment={crop: [0.7, 1], color: 0.3, blur: 0.5}",
    )
    first, last = learned(found["run"])
    assert last < 0.9 * first


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reproducible_run_has_the_same_bits_twice(config: Path, precision: str) -> None:
    settings = [
        ON_CARD,
        *REPRODUCIBLE,
        f"train.precision={precision}",
        "data.augment={crop: [0.7, 1], rotate: 9, hue: 0.1, blur: 0.5}",
    ]
    one, two = (train(config, f"{precision}-{number}", *settings, threads=number) for number in (1, 2))
    assert_equal(two, one)


def test_utilization_is_told_where_its_library_is(plain: dict[str, Any]) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    assert any("system/gpu_utilization_percentage" in row for row in read_lines(Path(plain["run"]) / "metrics.jsonl"))


def test_more_local_workers_than_gpus_are_refused(nearfar: Any, config: Path) -> None:
    workers = torch.cuda.device_count() + 1
    settings = [ON_CARD, f"cluster.workers={workers}", "name=too-many"]
    answer: Answer = nearfar("train", config, "--local", *(part for setting in settings for part in ("--set", setting)))
    assert answer.code == 2
    assert f"set cluster.workers={workers - 1}" in answer.err


def test_more_than_the_gpu_holds_is_refused(nearfar: Any, config: Path) -> None:
    encoder = "encoder={name: convnet, patch: 1, widths: [512], blocks: 1}"
    settings = [ON_CARD, "data.image_size=2048", "data.batch=1024", encoder]
    answer: Answer = nearfar("check", config, *(part for setting in settings for part in ("--set", setting)))
    assert answer.code == 2
    assert "a GPU here has" in answer.err


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_curve_of_one(config: Path, plain: dict[str, Any]) -> None:
    assert_close(train(config, "two", ON_CARD, "cluster.workers=2"), plain, within=1e-8)


ENCODERS: dict[str, tuple[str, list[str]]] = {
    "resnet-bf16": ("timm", ["train.precision=bf16", "train.channels_last=true"]),
    "resnet-frozen-reproducible": ("timm, frozen", REPRODUCIBLE),
    "vit-bf16": ("transformers", ["train.precision=bf16"]),
    "vit-fp16-checkpointing": ("transformers", ["train.precision=fp16", "encoder.checkpointing=true"]),
    "vit-reproducible": ("transformers", REPRODUCIBLE),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_other_libraries_learn_or_have_the_same_bits_twice(
    config: Path, request: pytest.FixtureRequest, name: str
) -> None:
    kind, settings = ENCODERS[name]
    part = f"{{name: timm, model: resnet18, dim: 16, weights: false, freeze_batchnorm: {str('frozen' in kind).lower()}}}"
    side = 32
    if kind == "transformers":
        part, side = f"{{name: transformers, path: {request.getfixturevalue('vit')}, dim: 16}}", 16
    else:
        pytest.importorskip("timm", reason="timm is not installed")
    all_settings = [ON_CARD, *SIMPLE, f"encoder={part}", f"data.image_size={side}", "train.precision=fp32", *settings]
    found = train(config, name, *all_settings)
    if REPRODUCIBLE[0] in settings:
        assert_equal(train(config, f"{name}-again", *all_settings), found)
        return
    first, last = learned(found["run"])
    assert last < first
