"""Runs as jobs of a real Ray cluster behind a token, submitted from another folder and shell."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runfolder import read_lines
from cluster.store import open_client
from tests.conftest import CONFIG
from tests.ray_nodes import Host, Nodes, free_port, listens, ray_nodes, wait_for
from tests.runs import ROOT, assert_equal, train

pytestmark = pytest.mark.acceptance
README_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PROMPT_S = 30  # in which every mistake is answered


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with ray_nodes(hosts=[Host("127.0.0.1")], cpus=2, dashboard=True) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def config(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    file = folder / "run.yaml"
    file.write_text(CONFIG.format(name="small", shards=digits, storage=folder / "runs"))
    return file


def nearfar(cluster: Nodes, *arguments: str, cwd: Path, token: str | None = "") -> subprocess.Popen[str]:
    """`nearfar` in a shell of its own, elsewhere. token: another than the cluster's; None: without one."""
    environment = {**cluster.environment, "RAY_API_SERVER_ADDRESS": cluster.dashboard}
    if token is None:
        environment = {k: v for k, v in environment.items() if not k.startswith("RAY_AUTH")}
    elif token:
        environment["RAY_AUTH_TOKEN"] = token
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def answer(cluster: Nodes, *arguments: str, cwd: Path, code: int = 0, token: str | None = "") -> tuple[str, str]:
    process = nearfar(cluster, *arguments, cwd=cwd, token=token)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def sets(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


QUICK = sets(
    "train.precision=fp32",
    "train.reproducible=true",
    "train.micro_batch=16",
    "finish.report=false",
    "data.check_duplicates=false",
)


def test_a_job_is_followed_to_its_registered_model(cluster: Nodes, config: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    settings = [*QUICK, *sets("tracking.register=small", "name=whole")]
    out, err = answer(cluster, "submit", str(config), "--follow", *settings, cwd=tmp_path)
    print(f"\nsubmitted, followed, registered: {time.monotonic() - began:.0f} s")
    job = out.strip()
    assert job.startswith("nearfar-whole-")
    assert "loss" in err
    run = config.parent / "runs" / "whole"
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "FINISHED"
    client = open_client(f"sqlite:///{config.parent / 'runs' / 'mlflow.db'}")
    assert client.get_model_version_by_alias("small", "champion").run_id == result["mlflow_run_id"]
    tags = client.get_run(result["mlflow_run_id"]).data.tags
    assert tags["nearfar.job"] == job
    found, _ = answer(cluster, "jobs", "--json", cwd=tmp_path)
    (mine,) = [one for one in json.loads(found)["jobs"] if one["job"] == job]
    assert (mine["status"], mine["exit_code"], mine["run"]) == ("SUCCEEDED", 0, str(run))
    again, told = answer(cluster, "submit", str(config), *settings, cwd=tmp_path)
    assert again.strip() == job
    assert "has trained this already" in told
    log, _ = answer(cluster, "logs", "whole", "-n", "3", cwd=tmp_path)
    assert len(log.splitlines()) == 3
    alone = train(config, "alone", *[part for part in QUICK if part != "--set"])
    assert_equal({**result, "run": str(run)}, alone)


def test_a_job_is_stopped_and_submitted_again(cluster: Nodes, config: Path, tmp_path: Path) -> None:
    run = config.parent / "runs" / "long"
    settings = [*QUICK, *sets("name=long", "train.steps=1200", "train.evaluate_every=1000", "train.checkpoint_every=200")]
    first, _ = answer(cluster, "submit", str(config), *settings, cwd=tmp_path)
    wait_for("training", lambda: len(list(read_lines(run / "metrics.jsonl"))) > 20)
    same, told = answer(cluster, "submit", str(config), *settings, cwd=tmp_path)
    assert same == first
    assert "trains this already" in told
    _, taken = answer(cluster, "submit", str(config), *settings, "--set", "optim.lr=0.5", cwd=tmp_path, code=2)
    assert "with other settings: optim.lr" in taken
    follower = nearfar(cluster, "logs", "long", "-f", cwd=tmp_path)
    assert follower.stdout is not None
    assert follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    _, told = follower.communicate(timeout=30)
    assert follower.returncode == 130
    assert f"job {first.strip()} goes on" in told
    began = time.monotonic()
    stopped, _ = answer(cluster, "stop", "long", "--json", cwd=tmp_path)
    print(f"\nstopped in {time.monotonic() - began:.1f} s")
    assert json.loads(stopped)["status"] == "STOPPED"
    assert json.loads((run / "result.json").read_text())["status"] == "KILLED"
    client = open_client(f"sqlite:///{config.parent / 'runs' / 'mlflow.db'}")
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "KILLED"
    second, told = answer(cluster, "submit", str(config), "--follow", *settings, cwd=tmp_path)
    assert second.strip() == f"{first.strip()}-2"
    assert "goes on where" in told
    attempts = list(read_lines(run / "attempts.jsonl"))
    assert attempts[-1]["from_step"] > 0
    assert client.get_run(run_id).info.status == "FINISHED"
    result = json.loads((run / "result.json").read_text())
    alone = train(config, "undisturbed", *[part for part in settings if part != "--set" and not part.startswith("name=")])
    assert_equal({**result, "run": str(run)}, alone)


BROKEN = """
from trainer.losses.info_nce import InfoNCE

class Broken(InfoNCE):
    calls = 0

    def forward(self, rows):
        Broken.calls += 1
        if Broken.calls > 20:
            raise RuntimeError("the moon is in the wrong place")
        return super().forward(rows)
"""


def test_the_code_and_last_error_of_a_failing_job_reach_the_user(cluster: Nodes, config: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    own = sets("name=bad", "loss={name: 'broken:Broken'}", "tracking.enabled=false", "cluster.max_failures=0")
    _, err = answer(cluster, "submit", str(config), "--follow", "--code", ".", *own, cwd=tmp_path, code=1)
    assert "the moon is in the wrong place" in "".join(err.strip().splitlines()[-2:])
    _, err = answer(cluster, "submit", str(config), "--follow", *sets("name=none", "data.train=/nowhere"), cwd=tmp_path, code=2)
    assert "data.train" in err.strip().splitlines()[-1]


def test_own_modules_travel_along(cluster: Nodes, config: Path, tmp_path: Path) -> None:
    (tmp_path / "ranking.py").write_text(next(text for text in README_BLOCKS if "class Ranking(RowLoss)" in text))
    own = ['loss={name: "ranking:Ranking", scale: 20}', "train.steps=20", "tracking.enabled=false", "finish.report=false"]
    answer(cluster, "submit", str(config), "--follow", "--code", ".", *sets("name=own", *own), cwd=tmp_path)
    assert json.loads((config.parent / "runs" / "own" / "result.json").read_text())["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--address", "http://127.0.0.1:1"], "nobody answers at http://127.0.0.1:1"),
        (["--address", "http://no-such-host.invalid:8265"], "nobody answers"),
        (["--address", "ray://127.0.0.1:10001"], "http://127.0.0.1:8265"),
        (["--address", "gopher://x"], "is no http address"),
        (["--set", "cluster.workers=16"], "the cluster is too small for cluster.workers=16"),
        (["--set", "cluster.gpus_per_worker=1"], "0 GPUs together"),
        (["--env", "NOT_SET_ANYWHERE"], "it is not set here"),
        (["--code", "nowhere"], "is no folder"),
    ],
)
def test_mistakes_are_answered_at_once(cluster: Nodes, config: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    began = time.monotonic()
    _, err = answer(cluster, "submit", str(config), "--set", f"name=wrong-{len(told)}", *arguments, cwd=tmp_path, code=2)
    assert told in err
    assert "Traceback" not in err
    assert time.monotonic() - began < PROMPT_S


@pytest.mark.parametrize(("token", "told"), [(None, "wants a token"), ("f" * 32, "does not accept the token")])
def test_a_token_that_is_missing_or_wrong(cluster: Nodes, config: Path, tmp_path: Path, token: str | None, told: str) -> None:
    for command in (["submit", str(config)], ["jobs"], ["logs", "x"], ["stop", "x"]):
        _, err = answer(cluster, *command, cwd=tmp_path, code=2, token=token)
        assert told in err, command


def test_a_dashboard_that_is_none(cluster: Nodes, config: Path, tmp_path: Path) -> None:
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"], cwd=tmp_path)
    try:
        wait_for("the server", lambda: listens("127.0.0.1", port))
        _, err = answer(cluster, "jobs", "--address", f"http://127.0.0.1:{port}", cwd=tmp_path, code=2)
        assert "is no Ray dashboard" in err
    finally:
        server.kill()
        server.wait()


def test_an_unknown_job(cluster: Nodes, config: Path, tmp_path: Path) -> None:
    _, err = answer(cluster, "stop", "nobody", cwd=tmp_path, code=2)
    assert "knows no job 'nobody'" in err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["tracking.uri=http://127.0.0.1:{port}"], "tracking.uri: nobody answers"),
        (["cluster.checkpoints=s3://no-such-bucket-of-nearfar/x"], "cluster.checkpoints"),
        (["data.eval=/nowhere/eval"], "data.eval"),
    ],
)
def test_what_the_cluster_cannot_reach_is_told(
    cluster: Nodes, config: Path, tmp_path: Path, settings: list[str], told: str
) -> None:
    began = time.monotonic()
    pairs = [one.format(port=free_port()) for one in settings]
    name = f"name=reach-{abs(hash(told)) % 1000}"
    process = nearfar(cluster, "submit", str(config), "--follow", *QUICK, *sets(name, *pairs), cwd=tmp_path)
    _, err = process.communicate(timeout=200)
    assert process.returncode in (1, 2), err
    assert told in err.strip().splitlines()[-1], err
    print(f"\n{settings}: {time.monotonic() - began:.0f} s")
