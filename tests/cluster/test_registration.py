"""What is registered was loaded back and is the trained encoder, for all that can be handed to it, and says what it is."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from torch import Tensor, nn

from cluster.promotion import Registered, check_model_name
from cluster.registration import Gate, copy, register
from cluster.store import experiment_id, fluent, open_client
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
    about = {
        "name": "colour",
        "tags": {"data.digest": "abc", "run": "colour"},
        "metrics": {"recall_at_1": 0.5, "map_at_r": 0.25},
    }
    thresholds = {8: {"far_1e-3": 0.9}, 4: {"far_1e-3": 0.8}}
    export_encoder(
        Colour(), folder, image_size=16, resize="pad", card={"name": "Colour"}, dims=[4], thresholds=thresholds, about=about
    )
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


def put(place: tuple[str, str], exported: Path, name: str, verify: Any = lambda model: None, **gate: Any) -> Registered:
    uri, run_id = place
    gate = {"metric": "recall_at_1", "alias": "champion", **gate}
    return register(run_id, exported, uri=uri, name=name, gate=Gate(**gate), example=RED, verify=verify)


def measured(exported: Path, to: Path, value: float) -> Path:
    """A copy that was measured otherwise."""
    shutil.copytree(exported, to)
    about = json.loads((to / "about.json").read_text())
    (to / "about.json").write_text(json.dumps({**about, "metrics": {"recall_at_1": value}}))
    return to


def test_the_registered_model_gives_the_exported_vectors_for_all_that_a_column_can_be(
    place: tuple[str, str], exported: Path, tmp_path: Path
) -> None:
    import pandas as pd

    (tmp_path / "red.png").write_bytes(RED)
    text = base64.b64encode(RED).decode()
    seen: list[Any] = []
    done = put(place, exported, "colours", seen.append)
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
    with pytest.raises(MlflowException, match="row 1 is not an image"):
        seen[0].predict([RED, b"junk"])
    version = open_client(place[0]).get_model_version_by_alias("colours", "champion")
    metrics = {"metric.recall_at_1": "0.5", "metric.map_at_r": "0.25"}
    told = {"data.digest": "abc", "run": "colour", "verified": "true", "promotion.champion": "promoted"}
    assert version.tags == metrics | told
    assert version.run_id == place[1]
    assert version.description.startswith("# Colour")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["red.png"]


def test_vectors_come_shorter_and_as_small_integers(place: tuple[str, str], exported: Path) -> None:
    models: list[Any] = []
    put(place, exported, "short", models.append)
    whole = models[0].predict([RED, BLUE])
    short = models[0].predict([RED, BLUE], params={"dim": 4})
    np.testing.assert_allclose(short, whole[:, :4] / np.linalg.norm(whole[:, :4], axis=1, keepdims=True), rtol=1e-6)
    codes = models[0].predict([RED, BLUE], params={"dim": 4, "int8": True})
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, np.rint(short * 127))
    with pytest.raises(MlflowException, match="dim 5 is none of the lengths that this model was trained for: 4, 8"):
        models[0].predict([RED], params={"dim": 5})


def test_requests_of_a_served_model_are_answered_and_read_no_file(
    place: tuple[str, str], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.pyfunc.scoring_server import invocations

    models: list[Any] = []
    put(place, exported, "served", models.append)
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # as `mlflow models serve` does

    def post(body: dict[str, Any]) -> Any:
        schema = models[0].metadata.get_input_schema()
        return json.loads(invocations(json.dumps(body), "application/json", models[0], schema).response)["predictions"]

    text = base64.b64encode(RED).decode()
    expected = load_exported(exported)([RED])
    for body in ({"inputs": [text]}, {"dataframe_split": {"columns": ["image"], "data": [[text]]}}):
        np.testing.assert_allclose(post(body), expected, rtol=1e-6)
    assert post({"inputs": [text], "params": {"int8": True}}) == np.rint(expected * 127).tolist()
    (tmp_path / "red.png").write_bytes(RED)
    there, missing = str(tmp_path / "red.png"), str(tmp_path / "none.png")
    for bad in ("%%", there, missing, text[:40]):
        with pytest.raises(MlflowException, match="row 1 is not") as refused:
            post({"inputs": [text, bad]})
        assert refused.value.get_http_status_code() == 400
        assert "not base64, and files are not read here" in str(refused.value) or bad == text[:40]


def test_paths_can_be_forbidden_where_a_model_is_loaded(place: tuple[str, str], exported: Path, tmp_path: Path) -> None:
    import mlflow

    put(place, exported, "careful")
    (tmp_path / "red.png").write_bytes(RED)
    with fluent(place[0]):
        careful = mlflow.pyfunc.load_model("models:/careful/1", model_config={"paths": False})
        usual = mlflow.pyfunc.load_model("models:/careful/1")
    assert usual.predict(["red.png", tmp_path / "red.png"]).shape == (2, 8)
    for path in ("red.png", tmp_path / "red.png"):
        with pytest.raises(MlflowException, match="row 0"):
            careful.predict([path])


def test_the_requirements_are_pinned_and_have_no_torch(place: tuple[str, str], exported: Path) -> None:
    models: list[Any] = []
    put(place, exported, "pinned", models.append)
    with fluent(place[0]):
        lines = Path(mlflow_requirements("models:/pinned/1")).read_text().split()
    assert sorted(line.partition("==")[0] for line in lines) == ["mlflow", "numpy", "onnxruntime", "pandas", "pillow"]
    assert all(line.partition("==")[2] for line in lines)


def mlflow_requirements(uri: str) -> str:
    import mlflow

    return str(mlflow.pyfunc.get_model_dependencies(uri))


def test_a_model_that_is_not_what_was_trained_is_not_registered(place: tuple[str, str], exported: Path, tmp_path: Path) -> None:
    def refuse(model: Any) -> None:
        raise ValueError("cosine 0.3")

    put(place, exported, "checked")
    with pytest.raises(RuntimeError, match=r"loaded back is not what was trained: cosine 0\.3; it is not registered"):
        put(place, measured(exported, tmp_path / "better", 0.9), "checked", refuse)
    client = open_client(place[0])
    assert [v.version for v in client.search_model_versions("name = 'checked'")] == [1]
    assert client.get_model_version_by_alias("checked", "champion").version == 1


def test_a_folder_without_the_metric_is_refused_but_by_force(place: tuple[str, str], exported: Path) -> None:
    with pytest.raises(ValueError, match="has no 'accuracy' to be compared by; it has recall_at_1, map_at_r"):
        put(place, exported, "unknown", metric="accuracy")
    assert put(place, exported, "unknown", metric="accuracy", force=True).promoted


def test_a_version_is_copied_to_another_name_with_all_that_is_told_of_it(
    place: tuple[str, str], exported: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(place, exported, "dev", alias="latest")
    gate = Gate("recall_at_1", "champion")
    done = copy("models:/dev@latest", uri=place[0], name="prod", gate=gate)
    assert done == Registered("prod", "1", "champion", True, None)
    assert not copy("models:/dev/1", uri=place[0], name="prod", gate=gate).promoted
    assert copy("models:/dev/1", uri=place[0], name="prod", gate=Gate("recall_at_1", "champion", force=True)).promoted
    client = open_client(place[0])
    was, now = client.get_model_version("dev", "1"), client.get_model_version("prod", "1")
    assert now.tags == {
        **{key: value for key, value in was.tags.items() if key != "promotion.latest"},
        "copied.from": "models:/dev/1",
        "promotion.champion": "promoted",
    }
    assert (now.run_id, now.description, now.source) == (was.run_id, was.description, "models:/dev/1")
    for reference, message in (("models:/dev@nobody", "is not in the registry"), ("models:/dev", "is not in the registry")):
        with pytest.raises(ValueError, match=message):
            copy(reference, uri=place[0], name="prod", gate=gate)
    with pytest.raises(ValueError, match="is a version of 'dev' already"):
        copy("models:/dev/1", uri=place[0], name="dev", gate=gate)
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_run_that_is_over_stays_as_it_was(place: tuple[str, str], exported: Path) -> None:
    client = open_client(place[0])
    run = client.create_run(client.get_run(place[1]).info.experiment_id).info.run_id
    client.set_terminated(run, "KILLED", 1_700_000_000_000)
    put((place[0], run), exported, "late")
    info = client.get_run(run).info
    assert (info.status, info.end_time) == ("KILLED", 1_700_000_000_000)


def test_a_run_that_does_not_exist_gives_one_message(place: tuple[str, str], exported: Path) -> None:
    with pytest.raises(RuntimeError, match="the model could not be registered at sqlite:"):
        put((place[0], "0" * 32), exported, "nobody")


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "a'b\"c"])
def test_a_name_the_registry_would_refuse_is_refused_before(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no model name|cannot be searched for"):
        check_model_name(name)


def test_it_loads_where_nearfar_is_not_installed_and_says_nothing(
    place: tuple[str, str], exported: Path, tmp_path: Path
) -> None:
    put(place, exported, "abroad")
    (tmp_path / "red.png").write_bytes(RED)
    code = """
import json, sys
sys.modules.update(dict.fromkeys(["trainer", "configs", "pipelines", "cluster", "torch"]))
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
print(json.dumps(mlflow.pyfunc.load_model("models:/abroad@champion").predict(["red.png"]).tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code, place[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.float32(json.loads(done.stdout)), load_exported(exported)([RED]))
    assert "Warning" not in done.stderr
