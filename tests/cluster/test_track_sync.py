"""`nearfar track sync` brings MLflow to what the run's folder holds, however the run ended; real sqlite, a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.description import DatasetRef, Description, flatten
from cluster.lock import Held, Lock
from cluster.runfolder import RunFolder
from cluster.spool import Position
from cluster.store import open_client
from cluster.tracking import Tracker
from configs.load import parse_config
from configs.schema import RunConfig
from tests.conftest import Answer
from tests.mlflow_server import free_port, history, kill, serve, wait_for

Nearfar = Callable[..., Answer]


@pytest.fixture(autouse=True)
def _own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def folder(storage: Path, request: pytest.FixtureRequest) -> RunFolder:
    return RunFolder(storage / request.node.name.replace("[", "-").rstrip("]"))


def config(folder: RunFolder, **tracking: Any) -> RunConfig:
    values = {"name": folder.path.name, "data": {"train": "shards"}, "train": {"steps": 10}, "tracking": tracking}
    return parse_config(values)


def begin(folder: RunFolder, rows: int, **tracking: Any) -> RunConfig:
    """A run's folder as training leaves it when it is killed."""
    settings = config(folder, **tracking)
    folder.claim(settings)
    folder.attempts.write_text('{"time": 1000000000.0}\n')
    write(folder, range(rows))
    return settings


def write(folder: RunFolder, steps: range) -> None:
    with folder.metrics.open("a") as file:
        file.writelines(json.dumps({"step": i, "time": 1e9 + i, "train/loss": 1 / (i + 1)}) + "\n" for i in steps)


def end(folder: RunFolder, status: str, **more: Any) -> None:
    folder.write_result({"status": status, "wall_s": 3.0, **more})
    os.utime(folder.result_file, (1e9 + 60, 1e9 + 60))


def expected(rows: int) -> list[tuple[int, float]]:
    return [(i, 1 / (i + 1)) for i in range(rows)]


def address(storage: Path) -> str:
    return f"sqlite:///{storage / 'mlflow.db'}"


def sync(nearfar: Nearfar, folder: RunFolder, *arguments: str) -> dict[str, Any]:
    answer = nearfar("track", "sync", folder.path, "--json", *arguments)
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


def only_run(uri: str, name: str) -> Any:
    client = open_client(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], f"attributes.run_name = '{name}'")
    assert len(runs) == 1
    return runs[0]


def test_a_run_of_which_mlflow_has_heard_nothing_arrives_whole_and_once(nearfar: Nearfar, folder: RunFolder) -> None:
    settings = begin(folder, 1500)
    data = DatasetRef("emoji", "d" * 64, "/data/emoji", profile={"images": 12})
    Description({"mlflow.source.git.commit": "abc"}, (data,)).write(folder.description)
    end(folder, "FINISHED", mlflow_run_id=None, tracking_uri="sqlite:///elsewhere")
    (folder.path / "report").mkdir()
    (folder.path / "report" / "index.html").write_text("<html>")
    uri = address(folder.path.parent)
    first = sync(nearfar, folder)
    seen = [only_run(uri, settings.name)]
    second = sync(nearfar, folder)
    seen.append(only_run(uri, settings.name))
    assert (first["sent"], first["waiting"], second["sent"]) == (1500, 0, 0)
    assert history(uri, first["mlflow_run_id"]) == expected(1500)
    for run in seen:
        assert run.info.run_id == first["mlflow_run_id"] == second["mlflow_run_id"]
        assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 10**12, 10**12 + 60_000)
        assert run.data.params == dict(flatten(settings.model_dump(mode="json", by_alias=True)))
        assert run.data.tags["mlflow.source.git.commit"] == "abc"
        assert run.data.tags["nearfar.attempts"] == "1"
        assert [i.dataset.digest for i in run.inputs.dataset_inputs] == ["d" * 36]
    there = {file.path for file in open_client(uri).list_artifacts(first["mlflow_run_id"])}
    assert there == {"config.yaml", "metrics.jsonl", "report", "result.json"}
    result = folder.result()
    assert result is not None
    assert (result["mlflow_run_id"], result["tracking_uri"]) == (first["mlflow_run_id"], uri)


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_that_seems_to_be_under_way_gets_the_status_of_its_result(
    nearfar: Nearfar, folder: RunFolder, status: str
) -> None:
    settings = begin(folder, 5)
    tracker = Tracker(folder.path, settings)
    tracker.start()
    assert tracker.finish("FINISHED")
    open_client(tracker.uri).update_run(tracker.run_id, status="RUNNING")  # as when the server died before the end
    write(folder, range(5, 9))
    end(folder, status)
    assert sync(nearfar, folder)["status"] == status
    run = only_run(tracker.uri, settings.name)
    assert (run.info.run_id, run.info.status) == (tracker.run_id, status)
    assert history(tracker.uri, tracker.run_id) == expected(9)


DRIVER = """
import sys, time
from pathlib import Path
from cluster.runfolder import RunFolder
from cluster.tracking import Tracker
folder = RunFolder(Path(sys.argv[1]))
tracker = Tracker(folder.path, folder.config())
tracker.start()
assert tracker.wait(60)
print("open", flush=True)
time.sleep(300)
"""


def test_while_a_driver_lives_it_is_left_alone_and_after_its_kill_the_run_is_killed(
    nearfar: Nearfar, folder: RunFolder
) -> None:
    settings = begin(folder, 7)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, folder.path], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "open\n"
        uri = address(folder.path.parent)
        assert only_run(uri, settings.name).info.status == "RUNNING"
        refused = nearfar("track", "sync", folder.path)
        assert (refused.code, refused.out) == (2, "")
        assert f"process {driver.pid} on " in refused.err
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert only_run(uri, settings.name).info.status == "RUNNING"
    found = sync(nearfar, folder)
    assert found["status"] == only_run(uri, settings.name).info.status == "KILLED"
    assert history(uri, found["mlflow_run_id"]) == expected(7)


def test_a_driver_that_starts_during_a_sync_waits_for_it(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.tracking.POLL_S", 0.1)
    settings = begin(folder, 3)
    other = Lock(folder.tracking_lock)
    other.take()
    tracker = Tracker(folder.path, settings)
    tracker.start()
    assert tracker.wait(0.5) is None
    with pytest.raises(Held, match=f"process {os.getpid()} on "):
        Lock(folder.tracking_lock).take()
    other.release()
    assert tracker.wait(60) is not None
    assert tracker.finish("FINISHED")
    other.take()


def test_a_dead_server_is_told_with_what_waits_and_gets_it_when_it_is_back(
    nearfar: Nearfar, folder: RunFolder, tmp_path: Path
) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    begin(folder, 40, uri=f"http://someone:secret@127.0.0.1:{port}")
    end(folder, "FINISHED")
    for arguments in ([], ["--json"]):
        answer = nearfar("track", "sync", folder.path, *arguments)
        assert answer.code == 1
        assert "40 rows of metrics wait in" in answer.err
        assert "secret" not in answer.err + answer.out
        assert "Traceback" not in answer.err
    assert json.loads(answer.out)["waiting"] == 40
    server = serve(port, tmp_path)
    try:
        found = sync(nearfar, folder)
        assert (found["sent"], found["waiting"], found["error"]) == (40, 0, None)
        assert history(uri, found["mlflow_run_id"]) == expected(40)
        assert only_run(uri, config(folder).name).info.status == "FINISHED"
        assert {file.path for file in open_client(uri).list_artifacts(found["mlflow_run_id"])} >= {"result.json"}
    finally:
        kill(server)


def test_another_address_gets_everything_in_one_new_run(nearfar: Nearfar, folder: RunFolder, tmp_path: Path) -> None:
    settings = begin(folder, 12)
    end(folder, "FAILED")
    here = sync(nearfar, folder)
    elsewhere = f"sqlite:///{tmp_path / 'moved.db'}"
    there = [sync(nearfar, folder, "--uri", elsewhere) for _ in range(2)]
    assert [found["sent"] for found in there] == [12, 0]
    assert there[0]["mlflow_run_id"] != here["mlflow_run_id"]
    again = sync(nearfar, folder)
    assert again["mlflow_run_id"] == here["mlflow_run_id"]
    for uri in (elsewhere, address(folder.path.parent)):
        run = only_run(uri, settings.name)
        assert run.info.status == "FAILED"
        assert history(uri, run.info.run_id) == expected(12)


def test_the_address_that_training_had_from_its_environment_is_kept_without_its_password(
    nearfar: Nearfar, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = begin(folder, 2)
    theirs = f"sqlite:///{tmp_path / 'theirs.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs)
    tracker = Tracker(folder.path, settings)
    tracker.start()
    assert tracker.finish("KILLED")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync(nearfar, folder)["tracking_uri"] == theirs
    Description(server="http://***@mlflow.example").write(folder.description)
    answer = nearfar("track", "sync", folder.path)
    assert answer.code == 2
    assert "the password of http://***@mlflow.example was not kept" in answer.err


def test_what_is_no_tracked_run_is_refused(nearfar: Nearfar, folder: RunFolder, tmp_path: Path) -> None:
    begin(folder, 1, enabled=False)
    cases = [(tmp_path, "is no run's folder"), (tmp_path / "none", "is no run's folder"), (folder.path, "tracking.enabled")]
    for path, words in cases:
        answer = nearfar("track", "sync", path)
        assert (answer.code, answer.out) == (2, ""), answer
        assert words in answer.err
    assert list(tmp_path.iterdir()) == []
    begin(folder, 1)
    assert "file" in (answer := nearfar("track", "sync", folder.path, "--uri", "file:///tmp/x")).err
    assert answer.code == 2


def test_ctrl_c_while_the_rest_is_sent_ends_the_waiting_only(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(folder.path, begin(folder, 3, uri=f"http://127.0.0.1:{free_port()}"))
    tracker.start()
    wait_for(lambda: len(caplog.records) > 0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    waker = subprocess.Popen(
        [sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({os.getpid()}, {signal.SIGINT:d})"]
    )
    try:
        assert not tracker.finish("FINISHED", timeout_s=3600)
    finally:
        waker.wait()
        signal.signal(signal.SIGINT, before)
    assert f"nearfar track sync {folder.path}" in caplog.text
    assert Position.read(folder.path / "tracking.json").offset == 0
