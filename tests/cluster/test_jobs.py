"""What a job takes along, and what is told before any cluster is asked."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import entry
from cluster.jobs import package
from cluster.jobs.client import connect
from configs.schema import RunConfig

CONFIG = RunConfig.model_validate({"name": "small", "data": {"train": "/data"}, "train": {"steps": 1}})


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_job_takes_nearfar_its_config_and_code_along(tmp_path: Path) -> None:
    code, out = tmp_path / "code", tmp_path / "out"
    for name in ("own.py", "deep/er.py", ".git/config", "runs/x/config.yaml", "a.tar", "notes.txt", "__pycache__/own.pyc"):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text("x")
    package.stage(CONFIG, out, code=code, excludes=("*.txt",))
    here = names(out)
    assert {name for name in here if name.split("/")[0] not in package.PACKAGES} == {
        "own.py",
        "deep/er.py",
        package.CONFIG,
        package.REQUIREMENTS,
    }
    assert {"cluster/entry.py", "trainer/loop.py", "configs/recipes/emoji.yaml", "pipelines/order.py"} <= here
    assert not any("__pycache__" in name for name in here)
    assert entry.missing(out / package.REQUIREMENTS) == []  # all of it is installed here


def test_code_that_is_too_much_or_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "code"
    (code / "trainer").mkdir(parents=True)
    (code / "trainer" / "mine.py").write_text("x")
    with pytest.raises(ValueError, match="has a folder 'trainer'"):
        package.stage(CONFIG, tmp_path / "out", code=code)
    monkeypatch.setattr(package, "MOST_BYTES", 10)
    (code / "large.bin").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"the largest: large\.bin"):
        package.stage(CONFIG, tmp_path / "out2", code=code)


def test_what_an_image_lacks_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "requirements.json"
    wanted = ["torch>=2", "torch>=99", "no-such-package>=1", "also-none ; python_version < '3'"]
    file.write_text(json.dumps(wanted))
    outdated, absent = entry.missing(file)
    assert outdated.startswith("torch>=99 (it has ")
    assert absent == "no-such-package>=1"
    assert entry.missing(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ray://head:10001", "jobs go to the dashboard, http://head:8265"),
        ("gopher://head", "is no http address"),
        ("http://head:port", "is no http address"),
        ("127.0.0.1:1", "nobody answers at http://127.0.0.1:1"),
    ],
)
def test_addresses_that_are_none(address: str, told: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=told):
        connect(address)


def test_no_address_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="--address is missing"):
        connect(None)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as an old Ray does."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"version": "4", "ray_version": "2.9.3", "ray_commit": ""}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def old_cluster() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_cluster_that_is_too_old(old_cluster: str) -> None:
    with pytest.raises(RuntimeError, match=r"runs Ray 2\.9\.3, nearfar needs 2\.55 or newer"):
        connect(old_cluster)
