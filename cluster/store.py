"""Where MLflow keeps runs and models: the address, a quiet client for it, and a sqlite file made quickly and whole."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from configs.schema import Tracking

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
HIDDEN = "***@"  # instead of user and password
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def tracking_uri(tracking: Tracking, storage: Path) -> str:
    """The MLflow address: the config's, else MLFLOW_TRACKING_URI, else mlflow.db in `storage`; never relative.

    Call it on the driver: a relative sqlite path counts from the current folder. Raises ValueError for an address
    that MLflow would refuse later.
    """
    default = f"sqlite:///{storage.resolve() / 'mlflow.db'}"
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in SCHEMES:
        raise ValueError(
            f"tracking.uri {redact(uri)!r} is no MLflow server or database; give http://HOST:PORT or sqlite:///FILE"
        )
    if scheme == "sqlite" and not uri.partition(":///")[2]:
        raise ValueError(f"tracking.uri {uri!r} names no file; give sqlite:///FILE")
    if scheme == "sqlite":
        return f"sqlite:///{Path(uri.partition(':///')[2]).resolve()}"
    return uri


def experiment_name(tracking: Tracking) -> str:
    """The config's experiment; where the config leaves it open, MLFLOW_EXPERIMENT_NAME may name another."""
    chosen = "experiment" in tracking.model_fields_set
    return tracking.experiment if chosen else os.environ.get("MLFLOW_EXPERIMENT_NAME") or tracking.experiment


def ui_command(uri: str) -> str:
    """What to open in a browser, or the command that serves it: `mlflow ui --backend-store-uri ...`."""
    return redact(uri) if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def redact(uri: str) -> str:
    """`uri` without user and password, for messages."""
    return re.sub(r"(?<=://)[^/@]+@", HIDDEN, uri)


def brief(error: Exception) -> str:
    """The first line of what went wrong, without user and password."""
    lines = str(error).strip().splitlines()
    return redact(lines[0] if lines else type(error).__name__)[:300]


def open_client(uri: str) -> Any:
    """An MlflowClient for `uri`; a sqlite file that does not exist yet is made first."""
    hush()
    from mlflow import MlflowClient  # late: it takes 1.7 s, and reads what `hush` sets when it is imported

    if uri.startswith("sqlite:///"):
        _make_sqlite(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(uri)


def hush() -> None:
    """Keep MLflow's telemetry off the network and its chatter off the terminal; call it before MLflow is imported."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name)


def experiment_id(client: Any, name: str, uri: str, storage: Path) -> str:
    """Find or make the experiment; without a server its artifacts lie beside the sqlite file, else in `storage`."""
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise ValueError(f"the MLflow experiment {name!r} was deleted; restore it or choose another tracking.experiment")
    if found is not None:
        return str(found.experiment_id)
    if urlsplit(uri).scheme in ("http", "https", "databricks"):
        return str(client.create_experiment(name))
    root = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else storage.resolve()
    return str(client.create_experiment(name, artifact_location=(root / "mlartifacts").as_uri()))


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set those of `values` that are not set, for the length of the block: MLflow takes its time-outs from there only."""
    added = [key for key in values if key not in os.environ]
    os.environ.update({key: values[key] for key in added})
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _make_sqlite(path: Path) -> None:
    """MLflow's own migrations into a temporary file without waiting for the disk (7 s become 1.6 s), then a rename."""
    if path.exists():
        return
    from mlflow import MlflowClient
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def hurry(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    event.listen(Engine, "connect", hurry)
    try:
        MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
        if not path.exists():  # another run may have made it meanwhile
            temporary.replace(path)
    finally:
        event.remove(Engine, "connect", hurry)
        temporary.unlink(missing_ok=True)


def serve_ui(storage: Path, port: int) -> None:
    """Serve the MLflow page of `storage`/mlflow.db on 127.0.0.1 until Ctrl-C.

    Raises ValueError when there is no database or the port is taken.
    """
    database = storage / "mlflow.db"
    if not database.exists():
        raise ValueError(f"no {database}: no run has been tracked there; name the storage folder of your runs")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"port {port} cannot be used ({error.strerror}); choose another with --port") from error
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--default-artifact-root", (storage / "mlartifacts").as_uri(), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run([*command, "--workers", "1"], env=environment, check=False)


@contextmanager
def fluent(uri: str) -> Iterator[None]:
    """Point MLflow's module-wide address to `uri`: logging and loading models know no other; put back at the end."""
    hush()
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
