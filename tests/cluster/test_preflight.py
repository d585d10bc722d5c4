"""What a node is asked before a run starts on it; on real nodes in tests/integration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.job import Job
from cluster.preflight import Places, look, refuse_absent_server, refuse_private_database
from configs.schema import RunConfig
from tests.mlflow_server import free_port

WORD = "word"


@pytest.fixture
def places(digits: Path, tmp_path: Path) -> Places:
    probe = tmp_path / ".probe"
    probe.write_text(WORD)
    return Places(probe, (("data.train", f"{digits}/train"),), None, None)


def test_a_node_that_sees_all_of_it(places: Places) -> None:
    assert look(places, WORD) == []
    assert [path.name for path in places.probe.parent.iterdir()] == [".probe"]


def test_each_thing_that_a_node_does_not_reach_is_named(places: Places, tmp_path: Path) -> None:
    port = free_port()
    places = replace(
        places,
        data=(("data.train", "/nowhere"), *places.data),
        checkpoints=f"http://127.0.0.1:{port}/ck",
        interface="no0",
    )
    found = look(places, "another word")
    settings = [sentence.partition(":")[0] for sentence in found]
    assert settings == ["cluster.storage", "data.train", "cluster.checkpoints", "cluster.interface"]
    assert "is not the folder that the driver sees" in found[0]
    assert "/nowhere" in found[1]


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    base = {"name": "x", "data": {"train": "/data"}, "train": {"steps": 1}, "cluster": {"storage": str(tmp_path)}}
    return lambda **tracking: Job(RunConfig.model_validate({**base, "tracking": tracking}), tmp_path, 1, (), "abc")


def test_mlflow_is_looked_for_at_the_first_start_only(job: Callable[..., Job], tmp_path: Path) -> None:
    wrong = job(uri=f"http://me:secret@127.0.0.1:{free_port()}")
    with pytest.raises(RuntimeError, match=r"tracking\.uri: nobody answers at http://\*+@127\.0\.0\.1") as refused:
        refuse_absent_server(wrong)
    assert "secret" not in str(refused.value)
    (tmp_path / "attempts.jsonl").touch()
    refuse_absent_server(wrong)


def test_a_database_in_a_file_is_for_one_node(job: Callable[..., Job]) -> None:
    refuse_private_database(job(), 1)
    refuse_private_database(job(enabled=False), 2)
    refuse_private_database(job(uri="http://127.0.0.1:5000"), 2)
    with pytest.raises(RuntimeError, match="is a file of one machine, and this cluster has 2 nodes"):
        refuse_private_database(job(), 2)
