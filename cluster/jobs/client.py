"""The connection to a cluster's job server, with an answer for each way in which it can fail."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.store import redact

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PORT = 8265  # of Ray's dashboard
CONNECT_S, SETTLE_S = 5.0, 15.0
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
LEAST_RAY = (2, 55)  # as in pyproject.toml
RUN, SETTINGS = "nearfar.run", "nearfar.config"  # metadata of a job: its run's folder, its config as JSON
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def connect(address: str | None) -> JobSubmissionClient:
    """`address`: http(s)://HOST[:8265] of the dashboard; None: RAY_API_SERVER_ADDRESS or RAY_ADDRESS, if that is one.

    Raises ValueError for what is no such address, RuntimeError when nobody answers, refuses, or is too old.
    """
    url = _url(address)
    _refuse_unreachable(url)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in VARIABLES:  # Ray would prefer them to the address that it is given
        os.environ.pop(name, None)
    from ray.job_submission import JobSubmissionClient

    # A command says itself what it does.
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(url)
        found = version_of(client)
    except Exception as error:  # whatever a server answers that is none of Ray's
        raise RuntimeError(explain(url, error)) from error
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST_RAY:
        least = ".".join(map(str, LEAST_RAY))
        raise RuntimeError(f"the cluster at {url} runs Ray {found}, nearfar needs {least} or newer: update its image")
    return client


def version_of(client: JobSubmissionClient) -> str:
    """Ray's, on the cluster."""
    return str(client._server_ray_version)


def jobs_of(client: JobSubmissionClient) -> list[JobDetails]:
    """Those that nearfar submitted, the newest first."""
    mine = [job for job in client.list_jobs() if job.submission_id and RUN in (job.metadata or {})]
    return sorted(mine, key=lambda job: -(job.start_time or 0))


def find(client: JobSubmissionClient, name: str) -> JobDetails:
    """The job with this id; or the newest job of the run of this name. Raises ValueError when there is none."""
    jobs = jobs_of(client)
    for job in jobs:
        if name in (job.submission_id, run_name(job)):
            return job
    known = ", ".join(str(job.submission_id) for job in jobs[:5]) or "none"
    raise ValueError(f"the cluster knows no job {name!r}; the newest: {known}")


def run_name(job: JobDetails) -> str:
    return str((job.metadata or {})[RUN]).rpartition("/")[2]


def nodes_of(client: JobSubmissionClient) -> list[dict[str, float]]:
    """What each node has that is alive. A head that has just started knows of none for a few seconds, which it is given."""
    from ray.util.state import list_nodes

    deadline = time.monotonic() + SETTLE_S
    while not (alive := list_nodes(address=client.get_address(), filters=[("state", "=", "ALIVE")], limit=10_000)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return [dict(node.resources_total or {}) for node in alive]


def explain(url: str, error: BaseException) -> str:
    """One sentence for what a request to the job server ran into."""
    kind, text, url = type(error).__name__, str(error), redact(url)
    if kind == "AuthenticationError" or " 401" in text or " 403" in text:
        given = os.environ.get("RAY_AUTH_MODE") == "token"
        what = "does not accept the token it was given" if given else "wants a token"
        return (
            f"the cluster at {url} {what}: export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file) "
            "with the token of its head"
        )
    if kind in ("ConnectionError", "ConnectTimeout", "ReadTimeout", "SSLError"):
        return f"nobody answers at {url} as a Ray dashboard does ({_short(text)}); is it the head's, port {PORT}?"
    if kind in ("JSONDecodeError", "KeyError", "HTTPError") or "404" in text:
        return f"what answers at {url} is no Ray dashboard; name the head's, port {PORT} if it was not changed"
    return f"the cluster at {url}: {_short(text)}"


def _short(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def _url(address: str | None) -> str:
    if address is None:
        address = next((os.environ[name] for name in VARIABLES if name in os.environ), None)
        if address is None:
            raise ValueError("--address is missing: the http address of the cluster's dashboard, e.g. http://head:8265")
    if address.startswith("ray://"):
        host = urlsplit(address).hostname
        raise ValueError(
            f"--address {address} is a Ray Client's; jobs go to the dashboard, http://{host}:{PORT} if not changed"
        )
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"--address {address} is no http address of a dashboard, such as http://head:{PORT}")
    if port is None and parts.scheme == "http":
        url = f"http://{parts.hostname}:{PORT}{parts.path}"
    return url.rstrip("/")


def _refuse_unreachable(url: str) -> None:
    """Raise RuntimeError in seconds; requests would wait for minutes."""
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout=CONNECT_S).close()
    except OSError as error:
        reason = f"no answer within {CONNECT_S:g} s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise RuntimeError(
            f"nobody answers at {redact(url)}: {reason}; is the cluster up, and is it the dashboard's address (port {PORT})?"
        ) from error


def details(job: JobDetails) -> dict[str, Any]:
    """A job as `--json` prints it."""
    return {
        "job": job.submission_id,
        "run": (job.metadata or {}).get(RUN),
        "status": str(job.status.value if hasattr(job.status, "value") else job.status),
        "exit_code": job.driver_exit_code,
        "started": None if job.start_time is None else job.start_time / 1000,
        "ended": None if not job.end_time else job.end_time / 1000,
    }
