"""`nearfar embed`: every image once, in order, as evaluation sees it, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from cluster import embed as embedding
from cluster.building import plain
from cluster.embed_ray import cpus_each, room
from cluster.embeddings import Embeddings
from cluster.models import Model, open_model
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.stream import evaluation_batches
from pipelines.vectors import encode_vectors
from tests.cluster.encoders import DIM, pack_many
from tests.conftest import Answer
from tests.pipelines.conftest import fill_classes, paint
from tests.runs import ROOT
from tests.small_disk import fill, small_disk
from trainer.evaluate import embed as evaluation_loop

Nearfar = Callable[..., Answer]


@pytest.fixture
def model(small_model: Path) -> Path:
    return small_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_classes(tmp_path_factory.mktemp("images") / "images", {"a": 30, "b": 31})


@pytest.fixture(autouse=True)
def _small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "RECORDS_A_SPAN", 16)


def rows(out: Path) -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(out).to_pydict()


def test_shards_give_the_vectors_of_evaluation_in_the_manifests_order(
    nearfar: Nearfar, model: Path, digits: Path, tmp_path: Path
) -> None:
    answer = nearfar("embed", model, digits / "eval", tmp_path / "v.parquet", "--local", "--batch", 7, "--json")
    told = json.loads(answer.out)
    manifest = Manifest.open(digits / "eval")
    found = rows(tmp_path / "v.parquet")
    assert told["rows"] == len(found["key"]) == manifest.num_samples
    assert (told["rejected"], told["dim"]) == (0, DIM)
    assert told["images_per_s"] > 0
    assert f"embedding: {manifest.num_samples}/{manifest.num_samples} images" in answer.err
    assert found["key"] == manifest.keys(0)
    assert found["label"] == manifest.column(0, "label")
    assert found["record"] == list(range(manifest.num_samples))
    opened = open_model(str(model))
    batches = evaluation_batches(manifest, opened.data(str(digits / "eval")))
    expected = evaluation_loop(_FromFloats(opened), batches, plain(torch.device("cpu"), torch.float32))
    assert np.abs(np.asarray(found["embedding"]) - expected.vectors.numpy()).max() < 1e-6


class _FromFloats(torch.nn.Module):
    """A model behind what `plain` makes of its pixels."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = [model.module]  # in a list: an exported program refuses to be put into a mode

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model[0]((images * 255).round().to(torch.uint8))
        return found


def test_a_folder_by_class_or_flat_leaves_out_and_lists_what_cannot_be_read(
    nearfar: Nearfar, model: Path, source: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "b").symlink_to(source / "b", target_is_directory=True)
    paint(7).save(images / "loose.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (images / "note.txt").write_text("no image")
    answer = nearfar("embed", model, images, tmp_path / "v.parquet", "--local")
    assert answer.code == 0, answer.err
    assert "32 vectors of 8 numbers" in answer.out
    assert "1 left out, see" in answer.out
    found = rows(tmp_path / "v.parquet")
    assert found["key"] == [*(f"b/{name}" for name in sorted(os.listdir(source / "b"))), "loose.png"]
    assert found["label"] == ["b"] * 31 + [None]
    (line,) = (tmp_path / "v.parquet.rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "broken.jpg"
    assert json.loads(line)["reason"]


def test_pairs_of_a_table_and_of_shards_have_a_row_for_each_image(nearfar: Nearfar, model: Path, tmp_path: Path) -> None:
    for seed in range(5):
        paint(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "text.npy").write_bytes(encode_vectors(np.ones((1, 4), np.float32))[0])
    lines = ["anchor,positive,group", "0.png,1.png,g", "2.png,text.npy,h", "3.png,4.png,"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    (tmp_path / "4.png").write_bytes(b"")
    pack(tmp_path / "pairs.csv", tmp_path / "shards", kind="pair")
    members = [["anchor", "positive"], ["anchor"], ["anchor"]]
    for name, number in (("pairs.csv", 3), ("shards", 2)):  # packing leaves out the third record, embedding only its image
        out = tmp_path / f"{name}.parquet"
        answer = nearfar("embed", model, tmp_path / name, out, "--local")
        assert answer.code == 0, answer.err
        found = rows(out)
        assert found["member"] == [member for names in members[:number] for member in names]
        assert found["record"] == [record for record, names in enumerate(members[:number]) for _ in names]
        assert found["label"][:2] == ["g", "g"]
    first, second = (np.asarray(rows(tmp_path / f"{name}.parquet")["embedding"])[:3] for name in ("pairs.csv", "shards"))
    assert np.abs(first - second).max() < 1e-6


def test_an_image_that_was_damaged_since_leaves_the_other_of_its_pair(nearfar: Nearfar, model: Path, tmp_path: Path) -> None:
    for seed in range(4):
        paint(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "pairs.csv").write_text("anchor,positive\n0.png,1.png\n2.png,3.png\n")
    pack(tmp_path / "pairs.csv", tmp_path / "shards", kind="pair")
    manifest = Manifest.open(tmp_path / "shards")
    with manifest.shard_path(0).open("r+b") as file:
        file.seek(int(manifest.table(0).offset[1]) + 20)
        file.write(b"damage")
    assert nearfar("embed", model, tmp_path / "shards", tmp_path / "v.parquet", "--local").code == 0
    assert rows(tmp_path / "v.parquet")["member"] == ["anchor", "anchor", "positive"]
    (line,) = (tmp_path / "v.parquet.rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["member"] == "positive"
    assert "CRC32" in json.loads(line)["reason"]


def test_a_stopped_call_goes_on_to_the_same_bytes(
    nearfar: Nearfar, model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--local", "--batch", 5)
    nearfar("embed", model, source, tmp_path / "whole.parquet", *arguments)
    out, real, seen = tmp_path / "v.parquet", embedding.embed_span, []

    def interrupted(job: Any, span: Any) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(span.number)
        return real(job, span)

    monkeypatch.setattr(embedding, "embed_span", interrupted)
    answer = nearfar("embed", model, source, out, *arguments)
    assert answer.code == 130
    assert "the same command goes on there" in answer.err
    assert not out.exists()
    seen[:] = []
    monkeypatch.setattr(embedding, "embed_span", lambda job, span: (seen.append(span.number), real(job, span))[1])
    answer = nearfar("embed", model, source, out, *arguments)
    assert seen == [2, 3]
    assert "32 were there already" in answer.out
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "v.parquet.partial").exists()
    before = out.stat().st_mtime_ns
    again = nearfar("embed", model, source, out, *arguments)
    assert again.code == 0
    assert "nothing to do" in again.err
    assert out.stat().st_mtime_ns == before


def test_another_model_source_or_option_is_refused_with_what_differs(
    nearfar: Nearfar, model: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = fill_classes(tmp_path / "images", {"a": 40}), tmp_path / "v.parquet"
    monkeypatch.setattr(embedding.Parts, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert nearfar("embed", model, source, out, "--local").code == 130
    monkeypatch.undo()
    monkeypatch.setattr(embedding, "RECORDS_A_SPAN", 16)
    for arguments, told in (
        ((other_model, source, out), "weights: "),
        ((model, source, out, "--batch", 5), "batch: 256 then, 5 now"),
        ((model, source, out, "--dim", 4), "dim: 8 then, 4 now"),
    ):
        answer = nearfar("embed", *arguments, "--local")
        assert answer.code == 2
        assert told in answer.err
    paint(99).save(source / "a" / "new.png")
    assert "before the source changed" in nearfar("embed", model, source, out, "--local").err
    (source / "a" / "new.png").unlink()
    assert nearfar("embed", model, source, out, "--local").code == 0
    for arguments, told in (((other_model, source), "weights: "), ((model, source, "--dim", 4), "dim: 8 there, 4 now")):
        answer = nearfar("embed", *arguments[:2], out, *arguments[2:], "--local")
        assert answer.code == 2
        assert told in answer.err


def test_fewer_numbers_are_the_first_ones_with_length_1(nearfar: Nearfar, model: Path, source: Path, tmp_path: Path) -> None:
    nearfar("embed", model, source, tmp_path / "all.parquet", "--local")
    nearfar("embed", model, source, tmp_path / "some.parquet", "--local", "--dim", 3)
    every, some = (np.asarray(rows(tmp_path / f"{name}.parquet")["embedding"]) for name in ("all", "some"))
    first = every[:, :3] / np.linalg.norm(every[:, :3], axis=1, keepdims=True)
    assert np.abs(some - first).max() < 1e-6
    answer = nearfar("embed", model, source, tmp_path / "x.parquet", "--local", "--dim", 9)
    assert (answer.code, "give 1 to 8" in answer.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("MODEL", "SOURCE", "v.csv"), "OUT must be a .parquet file"),
        (("MODEL", "nowhere", "v.parquet"), "no folder"),
        (("MODEL", "EMPTY", "v.parquet"), "no image in"),
        (("nothing", "SOURCE", "v.parquet"), "no run folder, checkpoint or exported encoder"),
        (("MODEL", "SOURCE", "v.parquet", "--address", "ray://x:1"), "exclude each other"),
        (("MODEL", "SOURCE", "v.parquet", "--workers", "2", "--gpus-per-worker", "1"), "leave --local out"),
    ],
)
def test_mistakes_are_told(
    arguments: tuple[str, ...], told: str, nearfar: Nearfar, model: Path, source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(model), "SOURCE": str(source), "EMPTY": "empty"}
    answer = nearfar("embed", *(places.get(one, one) for one in arguments), "--local")
    assert answer.code == 2
    assert told in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == ["empty"]


def test_a_full_disk_is_told_in_one_message_and_loses_nothing(
    nearfar: Nearfar, model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearfar("embed", model, source, tmp_path / "whole.parquet", "--local")
    with small_disk(tmp_path / "disk", kib=256) as disk:
        out = disk / "v.parquet"
        ballast = fill(disk, leave_kib=4)
        answer = nearfar("embed", model, source, out, "--local")
        assert (answer.code, "no space left on the disk" in answer.err) == (2, True)
        monkeypatch.setattr(embedding, "_require_space", lambda *_: None)
        answer = nearfar("embed", model, source, out, "--local")
        assert (answer.code, "no space left on the disk" in answer.err) == (2, True)
        assert "the same command goes on" in answer.err
        ballast.unlink()
        assert nearfar("embed", model, source, out, "--local").code == 0
        assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.acceptance  # processes take long to start
def test_several_processes_give_the_bytes_of_one(nearfar: Nearfar, model: Path, source: Path, tmp_path: Path) -> None:
    for out, workers in (("one.parquet", 1), ("two.parquet", 2)):
        assert nearfar("embed", model, source, tmp_path / out, "--local", "--workers", workers).code == 0
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_workers_on_ray_get_as_many_cpus_as_fit_on_the_nodes() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}, {"memory": 1e9}]
    assert [cpus_each(nodes, count, 0) for count in (1, 2, 3, 5, 10)] == [4, 4, 2, 2, 1]
    assert [cpus_each(nodes, count, 1) for count in (1, 2, 3)] == [4, 2, 2]
    assert [cpus_each(nodes, count, 0.5) for count in (4, 6)] == [1, 1]
    assert [room(nodes, 1, gpus) for gpus in (0, 1, 0.5)] == [10, 3, 6]
    for count, gpus in ((11, 0), (4, 1), (1, 3)):
        with pytest.raises(RuntimeError, match="do not fit on the cluster, which has 10 CPUs and 3 GPUs"):
            cpus_each(nodes, count, gpus)


COUNT = 50_000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_many(tmp_path_factory.mktemp("many"), COUNT, side=16)


def start(model: Path, source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli", "embed", str(model), str(source), str(out), *options, "--json"]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def killed_after(parts: int, model: Path, source: Path, out: Path, *options: str) -> int:
    """Kill -9 once so many parts are there; returns how many there are then."""
    process, folder = start(model, source, out, *options), out.with_name(f"{out.name}.partial") / "parts"
    while len(list(folder.glob("*.arrow"))) < parts:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    return len(list(folder.glob("*.arrow")))


@pytest.mark.acceptance
def test_fifty_thousand_images_survive_kills(model: Path, many: Path, tmp_path: Path) -> None:
    """On Ray, killed twice, against an undisturbed run without Ray."""
    out, whole = tmp_path / "v.parquet", tmp_path / "whole.parquet"
    began = time.monotonic()
    first = killed_after(3, model, many, out)
    second = killed_after(first + 4, model, many, out)
    told, error = start(model, many, out).communicate(timeout=600)
    assert told, error
    result = json.loads(told)
    undisturbed, error = start(model, many, whole, "--local").communicate(timeout=600)
    assert undisturbed, error
    assert 0 < first < second < -(-COUNT // 2048)
    assert (result["rows"], result["rejected"]) == (COUNT, 0)
    assert result["resumed_images"] >= second * 2048 - 2048
    manifest = Manifest.open(many)
    keys = [key for shard in range(len(manifest.sizes)) for key in manifest.keys(shard)]
    found = pyarrow.parquet.read_table(out, columns=["key", "record"]).to_pydict()
    assert found["key"] == keys
    assert found["record"] == list(range(COUNT))
    same = out.read_bytes() == whole.read_bytes()
    difference = max(np.abs(a - b).max() for (_, a), (_, b) in zip(vectors(out), vectors(whole), strict=True))
    print(
        f"\n{first} and {second} of {-(-COUNT // 2048)} parts were there at the kills; {time.monotonic() - began:.0f} s in all"
    )
    print(f"killed on Ray and undisturbed without: {'the same bytes' if same else f'largest difference {difference:.1e}'}")
    print(f"images/s: {result['images_per_s']} on Ray, {json.loads(undisturbed)['images_per_s']} without")
    assert difference < 1e-6


@pytest.mark.acceptance
def test_what_goes_wrong_on_ray_is_one_message(model: Path, source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "shards")
    Manifest.open(tmp_path / "shards").shard_path(0).unlink()
    process = start(model, tmp_path / "shards", tmp_path / "v.parquet")
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 2
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("nearfar: cannot open the shard")


def vectors(out: Path) -> Iterator[tuple[int, np.ndarray]]:
    return Embeddings(out).vectors()
