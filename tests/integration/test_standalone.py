"""A registered encoder in a place that has nothing but what it asks for: loaded, compared, served, asked well and badly."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.models import find_checkpoint
from cluster.outcome import trained_encoder
from cluster.proof import sample, seen
from cluster.runfolder import RunFolder
from cluster.store import fluent, open_client
from pipelines.manifest import Manifest
from tests.mlflow_server import answers, free_port, kill, serve, wait_for
from tests.runs import train
from trainer.export import trained_vectors

pytestmark = pytest.mark.acceptance
NUMBER = 64
CONFIG = """
name: emoji
seed: 3
data: {{train: "{shards}/train", eval: "{shards}/eval", image_size: 32, batch: 64, per_class: 2}}
encoder: {{name: convnet, dim: 32, patch: 4, widths: [16, 32], blocks: 1, grid: 2}}
loss: {{name: info_nce, matryoshka: [8, 32]}}
optim: {{lr: 1.0e-3, warmup_steps: 5}}
train: {{steps: 40, checkpoint_every: 20, evaluate_every: 20}}
cluster: {{workers: 1, storage: "{storage}"}}
tracking: {{uri: "{uri}", register: emoji}}
"""
STRANGER = """
import importlib.util, json, pathlib, sys
for name in ("torch", "trainer", "cluster", "configs", "pipelines"):
    assert importlib.util.find_spec(name) is None, name
import mlflow, numpy
mlflow.set_tracking_uri(sys.argv[1])
here = pathlib.Path(sys.argv[2])
model = mlflow.pyfunc.load_model("models:/emoji@champion")
paths = sorted(str(path) for path in here.glob("*.image"))
numpy.save(here / "vectors.npy", model.predict(paths))
numpy.save(here / "short.npy", model.predict(paths, params={"dim": 8}))
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A tracking server, the run that registered there, its images, and a Python that has only the model's requirements."""

    uri: str
    run: RunFolder
    images: list[bytes]
    python: Path
    folder: Path

    def environment(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
        return {**clean, **quiet, "MLFLOW_TRACKING_URI": self.uri, "PATH": f"{self.python.parent}{os.pathsep}{clean['PATH']}"}


@pytest.fixture(scope="module")
def place(emoji_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder, port = tmp_path_factory.mktemp("standalone"), free_port()
    server, uri = serve(port, folder), f"http://127.0.0.1:{port}"
    try:
        config = folder / "emoji.yaml"
        config.write_text(CONFIG.format(shards=emoji_shards, storage=folder / "runs", uri=uri))
        result = train(config, "emoji", "finish.onnx=true")
        assert result["model"] == "models:/emoji@champion"
        run = RunFolder(Path(result["run"]))
        images = sample(Manifest.open(emoji_shards / "eval"), run.config().data, NUMBER)
        (folder / "images").mkdir()
        for i, image in enumerate(images):
            (folder / "images" / f"{i:02}.image").write_bytes(image)
        yield Place(uri, run, images, _empty_environment(uri, folder / "stranger"), folder / "images")
    finally:
        kill(server)


def _empty_environment(uri: str, folder: Path) -> Path:
    """A new virtual environment with the registered requirements, which name neither torch nor nearfar."""
    from mlflow.pyfunc import get_model_dependencies

    with fluent(uri):
        requirements = get_model_dependencies("models:/emoji@champion")
    named = sorted(line.partition("==")[0] for line in Path(requirements).read_text().split())
    assert named == ["mlflow", "numpy", "onnxruntime", "pandas", "pillow"]
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-qq", "-r", requirements], check=True)
    return python


@pytest.fixture(scope="module")
def expected(place: Place) -> Any:
    """What the trained encoder makes of the images behind the decoder of training.  [64, dim]"""
    config = place.run.config()
    return trained_vectors(trained_encoder(config, place.run), place.images, lambda image: seen(image, config.data))


def least_cosine(found: Any, expected: Any) -> float:
    return float((np.asarray(found, dtype=np.float64) * expected).sum(1).min())


def test_it_loads_without_torch_and_nearfar_and_gives_the_vectors_of_training(place: Place, expected: Any) -> None:
    assert len(place.images) == NUMBER
    command = [place.python, "-c", STRANGER, place.uri, place.folder]
    done = subprocess.run(command, env=place.environment(), cwd=place.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cosine = least_cosine(np.load(place.folder / "vectors.npy"), expected)
    short = expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True)
    print(f"\nsmallest cosine over {NUMBER} emoji: {cosine:.7f}")
    assert cosine > 0.9999
    assert least_cosine(np.load(place.folder / "short.npy"), short) > 0.9999


def test_what_is_registered_says_where_it_is_from(place: Place) -> None:
    client = open_client(place.uri)
    version = client.get_model_version_by_alias("emoji", "champion")
    result = place.run.result()
    assert result is not None
    assert version.run_id == result["mlflow_run_id"]
    assert float(version.tags["metric.recall_at_1"]) == result["metrics"]["recall_at_1"]
    assert len(version.tags["data.digest"]) == 64
    assert version.tags["steps"] == str(find_checkpoint(place.run.path)[1].step)
    card = (place.run.export / "MODEL_CARD.md").read_text()
    for words in ("Match thresholds", "Noto Emoji by Google", "far_1e-3", "8, 32"):
        assert words in card


def ask(port: int, body: Any, kind: str = "application/json") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


@pytest.fixture
def port(place: Place) -> Iterator[int]:
    """`mlflow models serve` by the stranger's own MLflow."""
    port = free_port()
    command = [place.python, "-m", "mlflow", "models", "serve", "-m", "models:/emoji@champion", "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (place.folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            command, env=place.environment(), cwd=place.folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: server.poll() is not None or answers(port), 120)
        assert server.poll() is None, (place.folder / "serve.log").read_text()
        yield port
    finally:
        kill(server)


def test_it_is_served_and_answers_good_requests_and_refuses_bad_ones(place: Place, expected: Any, port: int) -> None:
    texts = [base64.b64encode(image).decode() for image in place.images]
    for body in ({"inputs": texts}, {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}}):
        status, found = ask(port, body)
        assert status == 200, found
        assert least_cosine(found["predictions"], expected) > 0.9999
    one = [f"data:image/png;base64,{texts[0]}"]
    status, found = ask(port, {"inputs": one, "params": {"dim": 8, "int8": True}})
    assert status == 200, found
    codes = np.asarray(found["predictions"])
    assert codes.shape == (1, 8)
    assert np.abs(codes).max() <= 127
    assert np.linalg.norm(codes / 127) == pytest.approx(1, abs=0.02)

    there, missing = str(place.folder / "00.image"), str(place.folder / "99.image")
    bad = ["no base64!", base64.b64encode(b"no image").decode(), texts[0][:80], there, missing, "", None, 7]
    for value in bad:
        status, message = ask(port, {"inputs": [texts[0], value]})
        assert status == 400, (value, status, message)
        assert "row 1" in message, (value, message)
        assert "Traceback" not in message
        assert len(message) < 1000
    told = [ask(port, {"inputs": [texts[0], path]})[1].replace(path, "PATH") for path in (there, missing)]
    assert told[0] == told[1]  # whether there is such a file is not to be found out
    for body, kind in (
        ({"inputs": texts[:1], "params": {"dim": 9}}, "application/json"),
        ({"inputs": texts[:1], "params": {"dim": "x"}}, "application/json"),
        ({"nothing": []}, "application/json"),
        (b"{", "application/json"),
    ):
        status, message = ask(port, body, kind)
        assert status == 400, (body, status, message)
    assert ask(port, {"inputs": texts[:1]})[0] == 200  # and goes on


def test_a_batch_of_one_is_answered_at_once_by_a_process_that_has_no_torch(place: Place, port: int) -> None:
    status, found = ask(port, {"inputs": [base64.b64encode(place.images[0]).decode()]})
    assert status == 200
    assert np.asarray(found["predictions"]).shape == (1, 32)
    maps = [Path(f"/proc/{pid}/maps") for pid in _family(port)]
    assert not any("libtorch" in path.read_text() for path in maps)


def _family(port: int) -> list[int]:
    """Processes whose command line names the port."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(port).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    assert found
    return found
