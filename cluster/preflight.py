"""Looks from every node of a cluster at what the run needs there, before a worker starts: storage, data, MLflow."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster import interfaces
from cluster.job import Job
from cluster.runfolder import RunFolder, write_atomically
from cluster.store import redact, tracking_uri

SERVER_S = 10.0


@dataclass(frozen=True, slots=True)
class Places:
    """What has to be reached from a node: `probe` is a file that the driver has written into the run's folder."""

    probe: Path
    data: tuple[tuple[str, str], ...]  # setting, path or URL
    cache: str | None
    checkpoints: str | None
    interface: str | None = None


def preflight(job: Job) -> None:
    """Raise RuntimeError that names what cannot be reached, and from which nodes. Ray is initialized."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    refuse_private_database(job, len(nodes))
    refuse_absent_server(job)
    probe = job.run / f".probe-{job.launch_id}"
    write_atomically(probe, job.launch_id)
    try:
        _refuse_unreachable(_places(job, probe), nodes, job.config.cluster.start_timeout_s)
    finally:
        for file in job.run.glob(f".probe-{job.launch_id}*"):
            file.unlink(missing_ok=True)


def refuse_private_database(job: Job, num_nodes: int) -> None:
    """Raise RuntimeError for sqlite and several nodes: a driver that starts again on another would write another database."""
    uri = tracking_uri(job.config.tracking, Path(job.config.cluster.storage))
    if job.config.tracking.enabled and uri.startswith("sqlite:") and num_nodes > 1:
        raise RuntimeError(
            f"tracking.uri: {uri} is a file of one machine, and this cluster has {num_nodes} nodes; start `mlflow server` and "
            "give its http address, or set tracking.enabled: false"
        )


def refuse_absent_server(job: Job) -> None:
    """Raise RuntimeError when nobody answers at MLflow's address, which the driver alone talks to: at the first start of a run.

    One that goes on does not wait for MLflow: what it misses arrives later.
    """
    uri = tracking_uri(job.config.tracking, Path(job.config.cluster.storage))
    if not job.config.tracking.enabled or not uri.startswith(("http://", "https://")) or RunFolder(job.run).attempts.exists():
        return
    parts = urlsplit(uri)
    try:
        socket.create_connection((parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]), SERVER_S).close()
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"tracking.uri: nobody answers at {redact(uri)} ({error}); start the server, mend the address, or set "
            "tracking.enabled: false"
        ) from error


def look(places: Places, word: str) -> list[str]:
    """What is wrong on this node, a sentence each. `word`: what the probe holds."""
    return [
        *_storage(places.probe, word),
        *(told for setting, place in places.data if (told := _data(setting, place, places.cache))),
        *_checkpoints(places.checkpoints),
        *_interface(places.interface),
    ]


def _places(job: Job, probe: Path) -> Places:
    config = job.config
    data = [("data.train", source.path) for source in config.data.train]
    data += [("data.eval", config.data.eval)] if config.data.eval is not None else []
    data += [("evaluate.gallery", config.evaluate.gallery)] if config.evaluate.gallery is not None else []
    return Places(probe, tuple(data), config.data.cache, config.cluster.checkpoints, config.cluster.interface)


def _refuse_unreachable(places: Places, nodes: list[dict[str, Any]], timeout_s: float) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    word, asked = places.probe.read_text(encoding="utf-8"), {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(str(node["NodeID"]), soft=False)
        asked[task.options(scheduling_strategy=here).remote(places, word)] = node
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    answered, wrong = set(done), dict[str, list[str]]()
    for reference in [*done, *late]:
        node = asked[reference]
        if node["NodeID"] not in there:  # it went away meanwhile, as nodes do
            continue
        try:
            told = (
                ray.get(reference)
                if reference in answered
                else [f"no answer within {timeout_s:g} s: a file system hangs there"]
            )
        except Exception as error:
            told = [f"nearfar does not run there ({str(error).strip().splitlines()[-1]}); its image lacks something"]
        for reason in told:
            wrong.setdefault(reason, []).append(str(node["NodeManagerAddress"]))
    if wrong:
        lines = [f"{reason} [{_nodes(names, len(nodes))}]" for reason, names in wrong.items()]
        raise RuntimeError("; ".join(lines))


def _nodes(names: list[str], num_nodes: int) -> str:
    if len(names) == num_nodes:
        return f"all {num_nodes} nodes" if num_nodes > 1 else f"node {names[0]}"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"node{'s' if len(names) > 1 else ''} {', '.join(sorted(names)[:5])}{more} of {num_nodes}"


def _storage(probe: Path, word: str) -> list[str]:
    try:
        seen = probe.read_text(encoding="utf-8") if probe.exists() else None
    except OSError as error:
        return [f"cluster.storage: {probe.parent} cannot be read ({error.strerror}); every node must share it"]
    if seen != word:
        return [f"cluster.storage: {probe.parent} is not the folder that the driver sees; name one that all nodes share (NFS)"]
    try:
        answer = probe.with_name(f"{probe.name}-{socket.gethostname()}")
        write_atomically(answer, word)
        answer.unlink(missing_ok=True)
    except OSError as error:
        return [f"cluster.storage: {probe.parent} cannot be written ({error.strerror})"]
    return []


def _data(setting: str, place: str, cache: str | None) -> str | None:
    from pipelines.manifest import Manifest

    try:
        Manifest.open(place, cache=cache)
    except Exception as error:  # of whatever storage library
        return f"{setting}: {error}"
    return None


def _checkpoints(place: str | None) -> list[str]:
    if place is None:
        return []
    from trainer.stores import open_store

    try:
        open_store(place).names()
    except Exception as error:
        return [f"cluster.checkpoints: {place} cannot be listed ({type(error).__name__}: {error})"]
    return []


def _interface(name: str | None) -> list[str]:
    try:
        interfaces.refuse_unknown(name)
    except ValueError as error:
        return [str(error)]
    return []
