"""What a run writes arrives in MLflow, whatever happens to the server or to us; against real sqlite and a real server."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import tracking
from cluster.description import DatasetRef, flatten
from cluster.spool import Position, read_points
from cluster.store import open_client, tracking_uri, ui_command
from cluster.tracking import Tracker
from configs.load import parse_config
from configs.schema import RunConfig
from tests.mlflow_server import free_port, history, kill, serve, wait_for


def config(**tracking: Any) -> RunConfig:
    return parse_config({"name": "demo", "data": {"train": "shards"}, "train": {"steps": 10}, "tracking": tracking})


def write(run: Path, steps: range) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": i, "time": 1e9 + i, "train/loss": 1 / (i + 1), "note": "x"}) + "\n" for i in steps)


def expected(steps: range) -> list[tuple[int, float]]:
    return [(i, 1 / (i + 1)) for i in steps]


@pytest.fixture(autouse=True)
def _no_leftovers(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "POLL_S", 0.1)
    monkeypatch.setattr(tracking, "LONGEST_DELAY_S", 0.4)
    here = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(here)
    yield
    assert list(here.iterdir()) == [], "something was written into the current folder"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a storage")


@pytest.fixture
def run(storage: Path, request: pytest.FixtureRequest) -> Path:
    folder = storage / request.node.name
    folder.mkdir()
    return folder


def test_params_metrics_tags_data_sets_and_artifacts_arrive(run: Path) -> None:
    data = DatasetRef("emoji", "d" * 64, "/data/emoji", profile={"images": 12})
    tracker = Tracker(run, config(), tags={"mlflow.source.git.commit": "abc"}, datasets=[data])
    write(run, range(1200))
    tracker.start()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 1200, "time": 1, "val/recall@1": NaN, "lr": 3}\nnonsense\n[1]\n{"step": 9'
        )  # the last one is not whole
    (run / "report").mkdir()
    (run / "report" / "index.html").write_text("<html>")
    assert tracker.finish("FINISHED")
    client = open_client(tracker.uri)
    seen = client.get_run(tracker.run_id)
    assert history(tracker.uri, tracker.run_id) == expected(range(1200))
    assert math.isnan(history(tracker.uri, tracker.run_id, "val/recall_1")[0][1])
    assert seen.info.status == "FINISHED"
    assert seen.info.run_name == "demo"
    assert seen.data.params == dict(flatten(config().model_dump(mode="json", by_alias=True)))
    assert seen.data.params["data.augment.flip"] == "0.0"
    assert seen.data.tags["mlflow.source.git.commit"] == "abc"
    assert seen.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    assert [f.path for f in client.list_artifacts(tracker.run_id, "report")] == ["report/index.html"]
    assert client.get_experiment_by_name("nearfar").artifact_location == (run.parent / "mlartifacts").as_uri()


def test_a_second_start_goes_on_in_the_same_run_where_the_first_one_stopped(run: Path) -> None:
    write(run, range(50))
    first = Tracker(run, config())
    first.start()
    assert first.finish("FAILED")
    write(run, range(50, 80))
    second = Tracker(run, config(experiment="nearfar"))
    second.start()
    assert second.finish("FINISHED")
    assert second.run_id == first.run_id
    assert history(second.uri, second.run_id) == expected(range(80))
    assert open_client(second.uri).get_run(second.run_id).info.status == "FINISHED"


def test_a_run_made_just_before_a_crash_is_found_again_and_a_replay_adds_nothing(run: Path) -> None:
    write(run, range(30))
    first = Tracker(run, config())
    first.start()
    assert first.finish("KILLED")
    Position(run_key=Position.read(run / "tracking.json").run_key).write(run / "tracking.json")  # as if we had died there
    second = Tracker(run, config())
    second.start()
    assert second.finish("FINISHED")
    assert second.run_id == first.run_id
    assert history(second.uri, second.run_id) == expected(range(30))


def test_a_run_that_was_deleted_is_made_again_with_all_its_metrics(run: Path) -> None:
    write(run, range(10))
    first = Tracker(run, config())
    first.start()
    assert first.finish("FINISHED")
    open_client(first.uri).delete_run(first.run_id)
    second = Tracker(run, config())
    second.start()
    assert second.finish("FINISHED")
    assert second.run_id != first.run_id
    assert history(second.uri, second.run_id) == expected(range(10))


def test_a_given_run_and_experiment_are_honoured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = open_client(tracking_uri(config().tracking, run.parent))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    mine = Tracker(run, config())
    mine.start()
    assert mine.finish("FINISHED")
    assert client.get_experiment(client.get_run(mine.run_id).info.experiment_id).name == "theirs"
    given = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    theirs = Tracker(run, config())
    theirs.start()
    assert theirs.wait(20) == given
    assert theirs.finish("FINISHED")


def test_every_point_arrives_although_the_server_is_late_killed_and_restarted(
    run: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def told() -> int:
        return sum(record.name == "cluster.tracking" for record in caplog.records)  # other threads may be patient with theirs

    port = free_port()
    tracker = Tracker(run, config(uri=f"http://127.0.0.1:{port}"))
    with caplog.at_level(logging.WARNING, logger="cluster"):
        write(run, range(200))
        tracker.start()
        wait_for(lambda: told() == 1)  # nobody listens yet: one warning, not one per attempt
        server = serve(port, tmp_path)
        try:
            wait_for(lambda: sent(run) == (run / "metrics.jsonl").stat().st_size)
            kill(server)
            write(run, range(200, 400))
            wait_for(lambda: told() == 2)
            server = serve(port, tmp_path)
            write(run, range(400, 600))
            assert tracker.finish("FINISHED", timeout_s=40)
            assert history(tracker.uri, tracker.run_id) == expected(range(600))
            assert open_client(tracker.uri).get_run(tracker.run_id).info.status == "FINISHED"
        finally:
            kill(server)
    assert told() == 2


def sent(run: Path) -> int:
    return Position.read(run / "tracking.json").offset if (run / "tracking.json").exists() else 0


def test_a_server_that_never_answers_costs_a_warning_and_no_metric(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as deaf:  # bound but not listening: refused
        deaf.bind(("127.0.0.1", 0))
        tracker = Tracker(run, config(uri=f"http://someone:secret@127.0.0.1:{deaf.getsockname()[1]}"))
        write(run, range(5))
        tracker.start()
        assert tracker.wait(0.3) is None
        started = time.monotonic()
        assert not tracker.finish("FINISHED", timeout_s=1)
        assert time.monotonic() - started < 10
    assert sent(run) == 0
    assert "secret" not in caplog.text
    assert "has not got everything" in caplog.text


def test_points_come_from_whole_lines_only_with_names_that_mlflow_takes(tmp_path: Path) -> None:
    spool = tmp_path / "metrics.jsonl"
    spool.write_text('{"step": 1, "time": 2.5, "a@b/../c": 1, "flag": true, "none": null}\n\n{"step": 2, "time": 3, "x": 2')
    (offset, points), (empty_end, nothing) = read_points(spool, 0)
    assert [(p.key, p.value, p.time_ms, p.step) for p in points] == [("c", 1.0, 2500, 1)]
    assert (empty_end, nothing) == (offset + 1, [])
    assert list(read_points(spool, empty_end)) == []
    spool.write_text('{"step": 1, "time": 2, "x": 1}\n')  # shorter than before: replaced
    assert len(list(read_points(spool, empty_end))) == 1


def test_the_address_is_the_configs_then_the_environments_then_a_file_in_the_storage_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(config().tracking, tmp_path / "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert tracking_uri(config().tracking, tmp_path) == "http://mlflow.example:5000"
    assert tracking_uri(config(uri="sqlite:///runs/m.db").tracking, tmp_path) == f"sqlite:///{Path.cwd()}/runs/m.db"
    assert ui_command("sqlite:////a b/m.db") == "mlflow ui --backend-store-uri 'sqlite:////a b/m.db'"
    for wrong in ("file:///tmp/mlruns", "runs/mlflow.db", "htp://x"):
        with pytest.raises(ValueError, match="is no MLflow server or database"):
            Tracker(tmp_path / "runs" / "demo", config(uri=wrong))


def test_a_position_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tracking.json").write_text('{"version": 9}')
    with pytest.raises(RuntimeError, match="written by another version of nearfar"):
        Tracker(tmp_path, config())
