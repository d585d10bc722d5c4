"""What people do with runs that are over: export, register, promote, list, compare, prune, log an evaluation."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.evaluation_runs import log_evaluation
from cluster.lock import Lock
from cluster.models import find_checkpoint, open_model
from cluster.proof import sample
from cluster.runfolder import RunFolder
from cluster.store import open_client
from pipelines.manifest import Manifest
from tests.conftest import CONFIG, Answer
from tests.runs import train
from trainer.export import load_exported

pytestmark = pytest.mark.acceptance
WHOLE = ("finish.report=true", "finish.onnx=true")


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with three checkpoints, registered as `digits`."""
    folder = tmp_path_factory.mktemp("after")
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(name="small", shards=digits, storage=folder / "runs"))
    settings = ("train.steps=12", "train.checkpoint_every=4", "train.evaluate_every=6", "optim.warmup_steps=2")
    result = train(config, "small", *settings, "cluster.workers=1", "tracking.register=digits", "train.precision=fp32", *WHOLE)
    return RunFolder(Path(result["run"]))


@pytest.fixture
def uri(run: RunFolder) -> str:
    return f"sqlite:///{run.path.parent / 'mlflow.db'}"


@pytest.fixture
def storage(run: RunFolder, tmp_path: Path) -> Path:
    """A storage folder with a copy of the run, and with the registry it knows."""
    shutil.copytree(run.path, tmp_path / "runs" / "small")
    config = tmp_path / "runs" / "small" / "config.yaml"
    config.write_text(config.read_text().replace("uri: null", f"uri: sqlite:///{run.path.parent}/mlflow.db"))
    return tmp_path / "runs"


def another(storage: Path, name: str, **result: Any) -> RunFolder:
    """A run that is as `small`, but for what became of it; without any result its driver was killed."""
    copied = RunFolder(Path(shutil.copytree(storage / "small", storage / name)))
    if result:
        copied.write_result({**(copied.result() or {}), **result})
    else:
        copied.result_file.unlink()
    return copied


def test_a_checkpoint_is_exported_registered_and_promoted_from_one_name_to_another(
    run: RunFolder, uri: str, tmp_path: Path, nearfar: Callable[..., Answer]
) -> None:
    middle = run.path / "checkpoints" / "step-00000006"
    if not middle.exists():
        middle = sorted((run.path / "checkpoints").iterdir())[0]
    done = nearfar("export", middle, "--out", tmp_path / "out", "--register", "dev", "--force", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["model"], found["version"], found["holder"]) == ("models:/dev@champion", "1", None)
    saved = find_checkpoint(middle)[1]
    version = open_client(uri).get_model_version("dev", "1")
    assert version.tags["steps"] == str(saved.step)
    assert version.run_id == (run.result() or {})["mlflow_run_id"]
    images = sample(Manifest.open(str(run.config().data.eval)), run.config().data, 8)
    exported = load_exported(tmp_path / "out")
    pixels = torch.from_numpy(np.stack([exported._pixels(0, image) for image in images]))
    expected = open_model(str(middle)).module(pixels).detach().numpy()
    assert (exported(images) * expected).sum(1).min() > 0.9999

    copied = nearfar("export", "models:/digits@champion", "--register", "prod", "--uri", uri, "--json")
    assert json.loads(copied.out)["model"] == "models:/prod@champion"
    again = nearfar("export", "models:/digits/1", "--register", "prod", "--uri", uri)
    assert "stays at version 1" in again.out
    whole = nearfar("export", "models:/prod/1", "--out", tmp_path / "prod", "--uri", uri)
    assert whole.code == 0
    assert (tmp_path / "prod" / "model.onnx").read_bytes() == (run.export / "model.onnx").read_bytes()
    assert open_client(uri).get_run(version.run_id).info.status == "FINISHED"
    assert open_model(version.run_id, uri=uri).origin.startswith("runs:/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "is no run folder, checkpoint or exported encoder"),
        (["RUN", "--alias", "x"], "give --register NAME"),
        (["RUN", "--register", "a/b"], "is no model name"),
        (["RUN/export"], "is exported already: give --out DIR for a copy, or --register NAME"),
        (["models:/digits/1"], "is registered: give --out DIR"),
        (["models:/digits@nobody", "--register", "x"], "is not in the registry"),
        (["models:/digits/1", "--register", "digits"], "is a version of 'digits' already"),
        (["RUN", "--out", "RUN/checkpoints"], "exists and is no exported encoder"),
    ],
)
def test_mistakes_are_told_in_one_message(
    run: RunFolder, uri: str, nearfar: Callable[..., Answer], arguments: list[str], message: str
) -> None:
    told = nearfar("export", *(part.replace("RUN", str(run.path)) for part in arguments), "--uri", uri)
    assert told.code == 2
    assert message in told.err
    assert "Traceback" not in told.err


def test_runs_are_listed_and_compared(storage: Path, nearfar: Callable[..., Answer]) -> None:
    other = another(storage, "other", status="FAILED", model=None, model_version=None)
    other.config_file.write_text(other.config_file.read_text().replace("lr: 0.001", "lr: 0.002"))
    another(storage, "lost")
    (storage / "mlartifacts").mkdir()  # no run
    found = {row["name"]: row for row in json.loads(nearfar("runs", "list", storage, "--json").out)["runs"]}
    assert {name: row["status"] for name, row in found.items()} == {
        "small": "FINISHED",
        "other": "FAILED",
        "lost": "UNFINISHED",
    }
    assert (found["small"]["steps"], found["small"]["model"], found["other"]["model"]) == (12, "digits/1", None)
    result = RunFolder(storage / "small").result() or {}
    assert found["small"]["before"] == result["before"]["recall_at_1"]
    assert found["small"]["after"] == result["metrics"]["recall_at_1"]
    assert "digits/1" in nearfar("runs", "list", storage).out

    told = json.loads(nearfar("runs", "compare", "small", storage / "other", "--storage", storage, "--json").out)
    assert told["settings"] == {"optim.lr": [0.001, 0.002]}
    assert told["metrics"][0]["recall_at_1"] == result["metrics"]["recall_at_1"]
    assert nearfar("runs", "compare", "small", "nobody", "--storage", storage).code == 2
    assert nearfar("runs", "list", storage / "none").code == 2


def test_prune_tells_first_and_then_frees_what_can_be_had_again(storage: Path, nearfar: Callable[..., Answer]) -> None:
    alone = another(storage, "alone", status="FINISHED", model=None, model_version=None)
    broken, lost, running = another(storage, "broken", status="KILLED"), another(storage, "lost"), another(storage, "running")
    untracked = another(storage, "untracked")
    untracked.config_file.write_text(untracked.config_file.read_text().replace("enabled: true", "enabled: false"))
    small = RunFolder(storage / "small")
    before = sorted(storage.rglob("*"))
    held = Lock(running.tracking_lock)
    held.take()
    dry = nearfar("runs", "prune", storage, "--keep", 0, "--json")
    assert [path for path in sorted(storage.rglob("*")) if path.name != ".tracking.lock"] == [
        path for path in before if path.name != ".tracking.lock"
    ]
    done = nearfar("runs", "prune", storage, "--keep", 0, "--yes", "--json")
    held.release()
    told, planned = json.loads(done.out), json.loads(dry.out)
    assert told["nbytes"] == planned["nbytes"] > 0
    assert sorted(map(str, told["runs"])) == sorted(map(str, planned["runs"]))

    def left(folder: RunFolder) -> tuple[int, bool]:
        return len(list((folder.path / "checkpoints").glob("step-*"))), folder.export.exists()

    assert left(small) == (0, False)  # the registry has it
    assert left(alone) == (0, True)
    assert left(broken) == left(lost) == (1, True)
    assert left(running) == left(untracked) == (3, True)
    assert find_checkpoint(broken.path)[1].step == 12
    assert open_model(str(alone.export)).dim == 16
    for folder in (small, alone):
        assert folder.metrics.exists()
        assert folder.result_file.exists()


def test_prune_keeps_the_newest_and_what_is_young(storage: Path, nearfar: Callable[..., Answer]) -> None:
    old = another(storage, "old", status="FINISHED")
    for file in (old.result_file, old.metrics, old.attempts, old.config_file):
        os.utime(file, (1_600_000_000, 1_600_000_000))
    for options in (["--keep", 1], ["--older-than", 30]):
        told = json.loads(nearfar("runs", "prune", storage, *options, "--json").out)
        assert [Path(one["run"]).name for one in told["runs"]] == ["old"]
    assert nearfar("runs", "prune", storage).code == 2


def test_an_export_stays_when_the_version_is_gone_from_the_registry(storage: Path, nearfar: Callable[..., Answer]) -> None:
    small = RunFolder(storage / "small")
    small.write_result({**(small.result() or {}), "model_version": "77"})
    nearfar("runs", "prune", storage, "--keep", 0, "--yes")
    assert small.export.exists()


def test_an_evaluation_lies_in_the_run_of_its_model(run: RunFolder, uri: str) -> None:
    shards = str(run.config().data.eval)
    result = {"metrics": {"recall_at_1": 0.5, "recall@odd": 0.25}, "intervals": {"recall_at_1": (0.4, 0.6)}}
    client, parent = open_client(uri), (run.result() or {})["mlflow_run_id"]
    for model in (str(run.path), "models:/digits@champion", parent):
        found = client.get_run(log_evaluation(model, shards, result, uri=uri))
        assert found.data.tags["mlflow.parentRunId"] == parent
        assert found.data.metrics["val/recall_at_1"] == 0.5
        assert found.data.metrics["val/recall_at_1_low"] == 0.4
        assert found.info.status == "FINISHED"
        assert found.inputs.dataset_inputs[0].dataset.digest == Manifest.open(shards).digest[:36]
    alone = client.get_run(log_evaluation(str(run.export), shards, result, uri=uri))
    assert "mlflow.parentRunId" not in alone.data.tags
    tags = client.get_run(parent).data.tags
    assert tags["nearfar.kind"] == "labelled"
    assert tags["nearfar.eval_digest"] == Manifest.open(shards).digest
