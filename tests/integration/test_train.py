"""One config, any way to run it: the same numbers, and a model that others can load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.runfolder import read_lines
from tests.runs import QUICK

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.acceptance


def train(config: Path, name: str, *arguments: str, whole: bool = False) -> dict[str, Any]:
    """`nearfar train` as its own process, `whole` with report and ONNX; the result that --json prints."""
    done = start(config, name, "--json", *arguments, whole=whole)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def start(config: Path, name: str, *arguments: str, whole: bool = False) -> subprocess.Popen[str]:
    quick = [] if whole else [part for setting in QUICK for part in ("--set", setting)]
    command = [sys.executable, "-m", "cluster.cli", "train", str(config), "--set", f"name={name}", *quick, *arguments]
    # A shell that runs the tests in the background has Ctrl-C ignored, and children inherit that.
    undo = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=undo)


def curve(result: dict[str, Any]) -> dict[int, dict[str, float]]:
    rows = list(read_lines(Path(result["run"]) / "metrics.jsonl"))
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), "each step once"
    return {row["step"]: row for row in rows}


@pytest.fixture(scope="module")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The config, and the run of one process without Ray."""
    from tests.conftest import CONFIG

    folder = tmp_path_factory.mktemp("runs")
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(name="small", shards=digits, storage=folder / "runs"))
    settings = ["--set", "cluster.workers=1", "--set", "data.threads=1", "--set", "tracking.register=digits"]
    return config, train(config, "one", "--local", *settings, whole=True)


def test_the_log_tells_what_the_loader_did(reference: tuple[Path, dict[str, Any]]) -> None:
    rows = [row for step, row in curve(reference[1]).items() if step > 0]
    assert all(0 <= row["train/wait_share"] <= 1 for row in rows)
    assert sum(row["loader/bytes_read"] for row in rows) > 0
    for name in ("bytes_fetched", "cache_hits", "cache_misses", "bad_images"):
        assert {row[f"loader/{name}"] for row in rows} == {0}


def assert_same_curve(result: dict[str, Any], reference: dict[str, Any]) -> None:
    found, expected = curve(result), curve(reference)
    assert list(found) == list(expected) == list(range(reference["steps"] + 1))
    for step, row in expected.items():
        for key in ("train/loss", "train/grad_norm", "val/recall_at_1", "val/map_at_r"):
            if key in row:
                assert found[step][key] == pytest.approx(row[key], rel=1e-8), (step, key)


def assert_went_on(run: Path, why: str) -> None:
    """The second start was from a checkpoint: the one at 20, or where the signal came late, the one at 40."""
    rows = list(read_lines(run / "attempts.jsonl"))
    assert [row["from_step"] for row in rows] in ([0, 20], [0, 40])
    assert [row["skipped"] for row in rows] == [[], []]
    assert rows[0]["last_ended"] is None
    assert why in rows[1]["last_ended"]


def test_training_learns(reference: tuple[Path, dict[str, Any]]) -> None:
    result = reference[1]
    assert result["metrics"]["map_at_r"] > result["before"]["map_at_r"] + 0.05


def test_two_local_processes_give_the_curve_of_one(reference: tuple[Path, dict[str, Any]]) -> None:
    assert_same_curve(train(reference[0], "two", "--local", "--set", "data.threads=3"), reference[1])


def test_micro_batches_give_the_same_curve(reference: tuple[Path, dict[str, Any]]) -> None:
    result = train(reference[0], "micro", "--local", "--set", "train.micro_batch=6", "--set", "tracking.enabled=false")
    assert_same_curve(result, reference[1])


def test_ray_with_two_workers_gives_the_curve_of_one_process(reference: tuple[Path, dict[str, Any]]) -> None:
    assert_same_curve(train(reference[0], "ray"), reference[1])


@SLOW
def test_a_run_killed_with_its_driver_goes_on_as_if_nothing_had_happened(reference: tuple[Path, dict[str, Any]]) -> None:
    config, expected = reference
    metrics = Path(expected["run"]).parent / "killed" / "metrics.jsonl"
    driver = start(config, "killed", "--local", "--set", "cluster.workers=1")
    deadline = time.monotonic() + 120
    while len(list(read_lines(metrics))) < 28:  # past the checkpoint at 20
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    result = train(config, "killed", "--local", "--resume")
    assert_same_curve(result, expected)
    assert_went_on(Path(result["run"]), "it left no word")


def test_a_killed_worker_is_replaced_and_the_curve_stays(reference: tuple[Path, dict[str, Any]]) -> None:
    config, expected = reference
    run = Path(expected["run"]).parent / "worker"
    driver = start(config, "worker", "--local", "--json", "--set", "tracking.enabled=false")
    deadline = time.monotonic() + 120
    while len(list(read_lines(run / "metrics.jsonl"))) < 28:
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(_workers(driver.pid)[-1], signal.SIGKILL)
    out, err = driver.communicate(timeout=200)
    assert driver.returncode == 0, err
    assert_same_curve(json.loads(out), expected)
    assert_went_on(run, "")


@pytest.mark.parametrize("how", ["local", pytest.param("ray", marks=SLOW)])
def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(reference: tuple[Path, dict[str, Any]], how: str) -> None:
    config, expected = reference
    run = Path(expected["run"]).parent / f"stopped-{how}"
    driver = start(config, run.name, *(["--local"] if how == "local" else []), "--set", "train.steps=3000")
    deadline = time.monotonic() + 120
    while len(list(read_lines(run / "metrics.jsonl"))) < 25:
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130
    saved = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    ending = f"stopped by Ctrl-C; the state of step {saved} is saved; `nearfar train CONFIG --resume` goes on from there"
    assert err.rstrip().endswith(ending)
    assert "Traceback" not in err
    assert json.loads((run / "result.json").read_text())["status"] == "KILLED"
    assert saved == max(row["step"] for row in read_lines(run / "metrics.jsonl"))  # nothing is lost
    assert not list(run.glob(".request-*")) + list(run.glob(".stopped-*"))


def _workers(pid: int) -> list[int]:
    """The spawned ranks of a driver: children that run multiprocessing's spawn_main."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_the_registered_model_gives_the_embeddings_of_the_trained_encoder(
    reference: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from cluster.gallery import Gallery
    from cluster.outcome import trained_encoder
    from cluster.runfolder import RunFolder

    _, result = reference
    assert result["model"] == "models:/digits@champion"
    folder = RunFolder(Path(result["run"]))
    config = folder.config()
    gallery = Gallery(config, trained_encoder(config, folder))
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(gallery.image(i))
    code = (
        "import sys, pathlib, numpy, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/digits@champion')\n"
        "images = [pathlib.Path(sys.argv[2], f'{i}.png').read_bytes() for i in range(40)]\n"
        "numpy.save(pathlib.Path(sys.argv[2], 'found.npy'), model.predict(images))\n"
        "assert not {'trainer', 'pipelines', 'cluster', 'configs'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    arguments = [sys.executable, "-c", code, result["tracking_uri"], str(tmp_path)]
    subprocess.run(arguments, check=True, cwd=tmp_path, env=environment, capture_output=True)
    cosine = (np.load(tmp_path / "found.npy") * gallery.found.vectors[:40].numpy()).sum(1)
    assert cosine.min() > 0.9999


def test_mlflow_holds_the_curve_the_params_and_the_report(reference: tuple[Path, dict[str, Any]]) -> None:
    from mlflow import MlflowClient

    _, result = reference
    client = MlflowClient(result["tracking_uri"])
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.momentum"] == "0.95"
    losses = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")}
    assert losses == {step: row["train/loss"] for step, row in curve(result).items() if "train/loss" in row}
    assert {"config.yaml", "metrics.jsonl", "report"} <= {a.path for a in client.list_artifacts(run.info.run_id)}


def test_a_model_opens_by_any_of_its_names(reference: tuple[Path, dict[str, Any]]) -> None:
    from cluster.models import open_model

    run, uri, run_id = (reference[1][name] for name in ("run", "tracking_uri", "mlflow_run_id"))
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = [run, f"{run}/export", "models:/digits@champion", "models:/digits/1", run_id]
    names += [str(checkpoint) for checkpoint in sorted(Path(run, "checkpoints").iterdir())][-1:]
    models = [open_model(name, uri=uri) for name in names]
    with torch.inference_mode():
        found = [model.module(pixels) for model in models]
    for vectors in found:
        assert torch.allclose(vectors, found[0], atol=1e-6)
    assert {(m.image_size, m.resize, m.dim, m.max_pixels) for m in models} == {(16, "crop", 16, 100_000_000)}
    assert [model.origin for model in models[2:4]] == ["models:/digits/1"] * 2
    assert "step 50" in models[0].origin


@pytest.mark.parametrize(
    ("name", "word"), [("/nowhere", "no run folder"), ("models:/digits@nobody", "not to be had"), ("0" * 32, "not to be had")]
)
def test_what_is_no_model_is_refused(reference: tuple[Path, dict[str, Any]], name: str, word: str) -> None:
    from cluster.models import open_model

    with pytest.raises(ValueError, match=word):
        open_model(name, uri=reference[1]["tracking_uri"])


def test_a_warm_start_begins_where_the_registered_model_ended(reference: tuple[Path, dict[str, Any]]) -> None:
    config, trained = reference
    settings = ["--set", "train.steps=8", "--set", "encoder.init=models:/digits@champion", "--set", "encoder.freeze=1"]
    result = train(config, "warm", "--local", *settings)
    assert result["before"]["map_at_r"] == pytest.approx(trained["metrics"]["map_at_r"], rel=1e-3)  # exported in float32
    assert result["metrics"]["map_at_r"] != result["before"]["map_at_r"]
    assert "models:/digits/1" in (Path(result["run"]) / "export" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    "loss", ["{name: arcface, scale: 16, sub_centers: 2}", pytest.param("{name: proxy_anchor}", marks=SLOW)]
)
def test_sharded_class_centres_give_the_same_curve_and_one_checkpoint_for_any_world(
    reference: tuple[Path, dict[str, Any]], loss: str
) -> None:
    config, name = reference[0], loss.partition(",")[0].strip("{} ").removeprefix("name: ")
    whole = ["--set", f"loss={loss}", "--set", "train.momentum=0", "--set", "tracking.enabled=false"]
    sharded = [*whole[2:], "--set", f"loss={loss.replace('}', ', shard: true}')}"]
    one = train(config, f"{name}-one", "--local", "--set", "cluster.workers=1", *whole)
    assert_same_curve(train(config, f"{name}-two", "--local", *whole), one)
    run = Path(one["run"]).parent / f"{name}-sharded"
    driver = start(config, run.name, "--local", *sharded)
    deadline = time.monotonic() + 120
    while len(list(read_lines(run / "metrics.jsonl"))) < 24:
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert_same_curve(train(config, run.name, "--local", "--resume", "--set", "cluster.workers=1", *sharded), one)
