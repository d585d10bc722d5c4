"""`nearfar plan`: what it says of real data, of data that is not there, and of what it cannot plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Answer

PLANNED = """
name: shop
data: {train: "s3://nowhere/pairs", image_size: 224, batch: 32768}
encoder: {name: timm, model: vit_base_patch16_224.augreg_in21k, dim: 512}
loss: {name: info_nce, queries: anchors, candidates: other_view, symmetric: true, learnable: true}
train: {epochs: 10, precision: bf16}
"""
TOLD = ("--samples", "100000000", "--image-kb", "80", "--kind", "pair", "--encoder", "vit-b16")
Call = Callable[..., Answer]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(PLANNED)
    return path


def plans(answer: Answer) -> list[dict[str, Any]]:
    assert answer.code == 0, answer.err
    found: list[dict[str, Any]] = json.loads(answer.out)["plans"]
    return found


def test_a_budget_for_data_that_is_not_there_yet(nearfar: Call, shop: Path) -> None:
    answer = nearfar("plan", shop, "--world", "8,64,1024", *TOLD, "--price-per-gpu-hour", "2.5", "--json")
    few, some, many = plans(answer)
    assert [p["share"]["records"] for p in (few, some, many)] == [4096, 512, 32]
    for one in (few, some, many):
        assert one["fits"]
        assert one["memory"]["total"] <= 80e9
        assert one["steps"] == 30518  # ten epochs of 10^8 pairs
        assert one["cost"] == pytest.approx(2.5 * one["gpu_h"])
        assert one["images_per_s"] == pytest.approx(65536 / one["times"]["step"])
    assert not few["asked"]  # 8192 images at once are too many for 80 GB
    assert few["micro_batch"] < 4096
    assert many["micro_batch"] == 32
    assert few["times"]["encoder"] > some["times"]["encoder"] > many["times"]["encoder"]
    assert few["nodes"] == 1
    assert few["amplification"] == pytest.approx(1, rel=0.01)
    assert many["amplification"] > 1.9  # 128 nodes share 64 lanes
    assert "data.lanes: 128" in many["advice"]
    # 2 x 32767 / 32768 of the gradients in fp32, whatever the number of GPUs
    parameters = json.loads(answer.out)["encoder"]["learned"]
    assert many["sent"]["gradients"] == pytest.approx(2 * 1023 / 1024 * 4 * parameters)


def test_the_text_is_plain_and_at_most_100_columns_wide(nearfar: Call, shop: Path) -> None:
    answer = nearfar("plan", shop, "--world", "1,2,4,8,16,64,1024", *TOLD)
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert answer.out.isascii()
    assert sum(line.startswith("GPUs") for line in lines) == 2  # two tables, as seven columns are too wide
    sentences = [line for line in lines if " GPUs. " in line]
    assert len(sentences) == 7


def test_what_limits_a_run_follows_what_it_is_given(nearfar: Call, shop: Path) -> None:
    def limit(*options: str) -> tuple[str, str]:
        (one,) = plans(nearfar("plan", shop, "--world", "64", *TOLD, "--json", *options))
        return one["limit"], one["advice"]

    assert limit()[0] == "compute"
    assert limit("--node-gbps", "1")[0] == "links"
    assert limit("--storage-gb-s", "0.5")[0] == "storage"
    assert limit("--cores-per-gpu", "0.5")[0] == "decoding"
    kind, advice = limit("--gpu", "t4", "--set", "data.image_size=2048")
    assert kind == "memory"
    assert "for the step's images; take more GPUs or lower data.batch" in advice


def test_real_shards_and_the_encoder_itself_are_measured(nearfar: Call, config_file: Path, digits: Path) -> None:
    answer = nearfar("plan", config_file, "--world", "1,2", "--gpu", "cpu", "--json", "--set", "train.precision=fp32")
    one, two = plans(answer)
    found = json.loads(answer.out)
    manifest = json.loads((digits / "train" / "manifest.json").read_text())
    assert found["data"]["num_records"] == manifest["num_samples"]
    assert found["data"]["measured"]
    assert found["data"]["decode_rate"] > 0
    assert found["encoder"]["source"] == "built here"
    assert one["sent"] == {}
    assert two["sent"]["gradients"] == found["encoder"]["learned"] * 4  # 2 (N - 1) / N is 1 for two ranks


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--world", "8"), "--samples"),
        (("--world", "8", "--samples", "1000", "--set", "encoder.model=swin_tiny"), "--encoder NAME"),
        (("--world", "8", *TOLD[:-1], "vit-b61"), "did you mean 'vit-b16'"),
        (("--world", "0", *TOLD), "--world 0"),
        (("--world", "eight", *TOLD), "--world eight"),
        (("--world", "8", *TOLD, "--gpu", "h1000"), "did you mean 'h100'"),
        (("--world", "40000", *TOLD), "raise data.batch"),
        (("--world", "8", *TOLD, "--kind", "pears"), "--kind pears"),
        (("--world", "8", *TOLD, "--set", "train.precision=fp64"), "train.precision fp64"),
    ],
)
def test_mistakes_are_told_in_one_message(nearfar: Call, shop: Path, options: tuple[str, ...], expected: str) -> None:
    if "--samples" not in options:
        text = shop.read_text().replace("s3://nowhere/pairs", str(shop.parent / "nowhere"))
        shop.write_text(text)
    answer = nearfar("plan", shop, *options)
    assert answer.code == 2
    assert expected in answer.err
    assert "Traceback" not in answer.err
