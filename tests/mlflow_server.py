"""A real MLflow server on this machine, and what it has got."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from cluster.store import open_client


def history(uri: str, run_id: str | None, key: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in open_client(uri).get_metric_history(run_id, key))


def wait_for(reached: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"nothing came within {seconds} s"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def serve(port: int, folder: Path) -> subprocess.Popen[bytes]:
    """A real `mlflow server`, answering; in a process group of its own."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")]
    open_client(f"sqlite:///{folder}/server.db")  # its tables, made the quick way
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **settings}, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    wait_for(lambda: server.poll() is not None or answers(port), 60)
    assert server.poll() is None, (folder / "server.log").read_text()
    return server


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def kill(server: subprocess.Popen[bytes]) -> None:
    """SIGKILL, to its workers too."""
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
