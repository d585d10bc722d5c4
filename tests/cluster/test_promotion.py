"""A version gets the alias only after it was loaded back and found to be the trained encoder, and never for a worse one."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cluster.promotion import Registered, check_model_name, register
from cluster.store import experiment_id, open_client
from trainer.export import export_encoder, load_exported


class Colour(nn.Module):
    """Mean colour through a linear layer, unit norm."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 8)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.head(images.mean((2, 3))), dim=1)


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png((200, 10, 10)), png((10, 10, 200))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "exported"
    export_encoder(Colour(), folder, image_size=16, resize="pad", card={"name": "Colour"})
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An MLflow address and a run in it."""
    storage = tmp_path_factory.mktemp("storage")
    uri = f"sqlite:///{storage}/mlflow.db"
    client = open_client(uri)
    return uri, client.create_run(experiment_id(client, "nearfar", uri, storage)).info.run_id


@pytest.fixture(autouse=True)
def _no_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def put(place: tuple[str, str], exported: Path, name: str, value: float, verify: Any = lambda model: None) -> Registered:
    uri, run_id = place
    options = {"alias": "champion", "metric": "recall_at_1", "example": RED, "tags": {"data.digest": "abc"}}
    return register(run_id, exported, uri=uri, name=name, value=value, verify=verify, **options)


def test_the_registered_model_gives_the_exported_vectors_for_all_that_a_column_can_be(
    place: tuple[str, str], exported: Path, tmp_path: Path
) -> None:
    import pandas as pd

    (tmp_path / "red.png").write_bytes(RED)
    text = base64.b64encode(RED).decode()
    seen: list[Any] = []
    done = put(place, exported, "colours", 0.5, verify=seen.append)
    assert done == Registered("colours", "1", "champion", True, None)
    assert done.uri == "models:/colours@champion"
    expected = load_exported(exported)([RED, BLUE])
    for column in (
        [RED, BLUE],
        np.array([RED, BLUE], dtype=object),
        pd.DataFrame({"image": [RED, BLUE]}),
        pd.DataFrame({"image": [text, base64.b64encode(BLUE).decode()]}),
        ["red.png", BLUE],
    ):
        vectors = seen[0].predict(column)
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, expected)
    with pytest.raises(ValueError, match="row 1 is not an image"):
        seen[0].predict([RED, b"junk"])
    version = open_client(place[0]).get_model_version_by_alias("colours", "champion")
    assert version.tags == {"metric.recall_at_1": "0.5", "data.digest": "abc", "verified": "true"}
    assert version.run_id == place[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["red.png"]


def test_requests_of_a_served_model_are_answered(place: tuple[str, str], exported: Path) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc.scoring_server import invocations

    models: list[Any] = []
    put(place, exported, "served", 0.5, verify=models.append)

    def post(body: dict[str, Any]) -> Any:
        schema = models[0].metadata.get_input_schema()
        return json.loads(invocations(json.dumps(body), "application/json", models[0], schema).response)["predictions"]

    text = base64.b64encode(RED).decode()
    expected = load_exported(exported)([RED])
    for body in ({"inputs": [text]}, {"dataframe_split": {"columns": ["image"], "data": [[text]]}}):
        np.testing.assert_allclose(post(body), expected, rtol=1e-6)
    with pytest.raises(MlflowException) as refused:
        post({"inputs": ["%%"]})
    assert refused.value.get_http_status_code() == 400


def test_the_alias_moves_to_a_version_that_is_at_least_as_good_and_nothing_is_printed(
    place: tuple[str, str], exported: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert put(place, exported, "race", 0.5).promoted
    worse = put(place, exported, "race", 0.4)
    assert (worse.promoted, worse.holder, worse.uri) == (False, "1", "models:/race/2")
    assert put(place, exported, "race", 0.5).promoted
    assert open_client(place[0]).get_model_version_by_alias("race", "champion").version == 3
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_model_that_is_not_what_was_trained_does_not_get_the_alias(place: tuple[str, str], exported: Path) -> None:
    def refuse(model: Any) -> None:
        raise ValueError("cosine 0.3")

    put(place, exported, "checked", 0.5)
    with pytest.raises(RuntimeError, match=r"version 2 of 'checked' is not what was trained: cosine 0\.3"):
        put(place, exported, "checked", 0.9, verify=refuse)
    client = open_client(place[0])
    assert client.get_model_version_by_alias("checked", "champion").version == 1
    assert client.get_model_version("checked", "2").tags["verified"] == "false"


def test_a_run_that_does_not_exist_gives_one_message(place: tuple[str, str], exported: Path) -> None:
    with pytest.raises(RuntimeError, match="the model could not be registered at sqlite:"):
        put((place[0], "0" * 32), exported, "nobody", 0.5)


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b"])
def test_a_name_the_registry_would_refuse_is_refused_before(name: str) -> None:
    with pytest.raises(ValueError, match="is no model name"):
        check_model_name(name)


def test_it_loads_where_nearfar_is_not_installed_and_says_nothing(
    place: tuple[str, str], exported: Path, tmp_path: Path
) -> None:
    put(place, exported, "abroad", 0.5)
    (tmp_path / "red.png").write_bytes(RED)
    code = """
import json, sys
sys.modules.update(dict.fromkeys(["trainer", "configs", "pipelines", "cluster"]))
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
print(json.dumps(mlflow.pyfunc.load_model("models:/abroad@champion").predict(["red.png"]).tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code, place[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.float32(json.loads(done.stdout)), load_exported(exported)([RED]))
    assert "Warning" not in done.stderr
