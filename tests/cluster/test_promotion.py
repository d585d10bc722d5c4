"""The alias ends at the best version, whoever promotes at the same time, and however slow or dead the others are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import promotion
from cluster.promotion import Registered, promote, ticket
from cluster.store import open_client
from tests.mlflow_server import free_port, kill, serve

ROUNDS = {"sqlite": 1, "http": 4}
RACERS = {"sqlite": [0.9, 0.5], "http": [0.5, 0.9, 0.1]}
ROOT = Path(__file__).parents[2]
PROMOTER = """
import sys
from cluster.promotion import promote, ticket
from cluster.store import open_client
uri, name, value = sys.argv[1:]
client = open_client(uri)
client.search_registered_models()
print("ready", flush=True)
sys.stdin.readline()
tags = {"metric.recall_at_1": value, **ticket("champion")}
version = str(client.create_model_version(name, "s3://nowhere/model", tags=tags).version)
print(promote(client, name, version, alias="champion", metric="recall_at_1").promoted)
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow makes folders where it is


@pytest.fixture
def client(tmp_path: Path) -> Any:
    client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("race")
    return client


def put(client: Any, value: float | None, **options: Any) -> Registered:
    tags = {} if value is None else {"metric.recall_at_1": repr(value)}
    version = client.create_model_version("race", "s3://nowhere/model", tags={**tags, **ticket("champion")}).version
    return promote(client, "race", str(version), alias="champion", metric="recall_at_1", **options)


def holder(client: Any) -> str:
    return str(client.get_model_version_by_alias("race", "champion").version)


def test_the_alias_moves_to_a_better_version_only_or_by_force(client: Any) -> None:
    assert put(client, 0.5) == Registered("race", "1", "champion", True, None)
    assert put(client, 0.5) == Registered("race", "2", "champion", False, "1")
    assert put(client, 0.6) == Registered("race", "3", "champion", True, "1")
    assert put(client, None) == Registered("race", "4", "champion", False, "3")
    assert put(client, float("nan")).promoted is False
    assert put(client, 0.1, force=True) == Registered("race", "6", "champion", True, "3")
    assert put(client, 0.2).promoted
    tags = [client.get_model_version("race", str(n)).tags["promotion.champion"] for n in range(1, 8)]
    assert tags == ["promoted", "not better", "promoted", "not better", "not better", "promoted", "promoted"]


def test_an_alias_that_somebody_moved_by_hand_is_compared_with_what_it_points_to(client: Any) -> None:
    for value in (0.5, 0.9):
        put(client, value)
    client.set_registered_model_alias("race", "champion", "1")
    assert put(client, 0.6).promoted


def test_a_version_that_was_registered_elsewhere_gives_way(client: Any) -> None:
    client.create_model_version("race", "s3://nowhere/model")
    client.set_registered_model_alias("race", "champion", "1")
    assert put(client, 0.1) == Registered("race", "2", "champion", True, "1")


def test_one_that_died_in_line_is_given_up_and_cannot_come_back(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tags = {"metric.recall_at_1": "0.3", **ticket("champion")}
    dead = str(client.create_model_version("race", "s3://nowhere/model", tags=tags).version)
    monkeypatch.setattr(promotion, "PATIENCE_S", 0.3)
    assert put(client, 0.5).promoted
    assert "version 1 of 'race' was never promoted to 'champion'" in caplog.text
    with pytest.raises(RuntimeError, match="version 1 of 'race' waited too long"):
        promote(client, "race", dead, alias="champion", metric="recall_at_1", force=True)
    assert holder(client) == "2"


def test_another_alias_is_another_line(client: Any) -> None:
    client.create_model_version("race", "s3://nowhere/model", tags=ticket("challenger"))
    assert put(client, 0.5).promoted


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.acceptance)])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        open_client(f"sqlite:///{tmp_path}/mlflow.db")
        yield f"sqlite:///{tmp_path}/mlflow.db"
        return
    port = free_port()
    server = serve(port, tmp_path)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        kill(server)


def race(address: str, values: list[float]) -> None:
    """One process a value; all of them begin at once."""
    command = [sys.executable, "-c", PROMOTER, address, "race"]
    options: dict[str, Any] = {"text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    options |= dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    racers = [subprocess.Popen([*command, repr(value)], **options) for value in values]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        out, err = racer.communicate(timeout=120)
        assert racer.returncode == 0, err
        assert out.strip() in ("True", "False")


def test_processes_that_promote_at_the_same_time_leave_the_best_with_the_alias(address: str) -> None:
    client = open_client(address)
    client.create_registered_model("race")
    for _ in range(ROUNDS[address.partition(":")[0]]):
        race(address, RACERS[address.partition(":")[0]])
    best = client.get_model_version_by_alias("race", "champion")
    assert best.tags["metric.recall_at_1"] == "0.9"
    versions = client.search_model_versions("name = 'race'")
    told = {int(v.version): (float(v.tags["metric.recall_at_1"]), v.tags["promotion.champion"]) for v in versions}
    so_far = 0.0
    for _, (value, outcome) in sorted(told.items()):  # as if one had come after the other, in the order of the versions
        assert outcome == ("promoted" if value > so_far else "not better")
        so_far = max(so_far, value)
