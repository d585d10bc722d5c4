"""Looks from every node of a cluster at what the run needs there, before a worker starts: storage, data, MLflow."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cluster import interfaces
from cluster.job import Job
from cluster.runfolder import write_atomically
from cluster.store import tracking_uri

PROBE_S = 10.0  # for one server
WAIT_S = 25.0  # for all nodes together


@dataclass(frozen=True, slots=True)
class Places:
    """What has to be reached from a node: `probe` is a file that the driver has written into the run's folder."""

    probe: Path
    data: tuple[tuple[str, str], ...]  # setting, path or URL
    cache: str | None
    checkpoints: str | None
    server: str | None  # http address of MLflow
    interface: str | None = None


def preflight(job: Job) -> None:
    """Raise RuntimeError that names what cannot be reached, and from which nodes. Ray is initialized."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    refuse_private_database(job, len(nodes))
    probe = job.run / f".probe-{job.launch_id}"
    write_atomically(probe, job.launch_id)
    try:
        _refuse_unreachable(_places(job, probe), nodes)
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


def look(places: Places, word: str) -> list[str]:
    """What is wrong on this node, a sentence each. `word`: what the probe holds."""
    return [
        *_storage(places.probe, word),
        *(told for setting, place in places.data if (told := _data(setting, place, places.cache))),
        *_checkpoints(places.checkpoints),
        *_server(places.server),
        *_interface(places.interface),
    ]


def _places(job: Job, probe: Path) -> Places:
    config = job.config
    data = [("data.train", source.path) for source in config.data.train]
    data += [("data.eval", config.data.eval)] if config.data.eval is not None else []
    data += [("evaluate.gallery", config.evaluate.gallery)] if config.evaluate.gallery is not None else []
    uri = tracking_uri(config.tracking, Path(config.cluster.storage))
    server = uri if config.tracking.enabled and uri.startswith(("http://", "https://")) else None
    return Places(probe, tuple(data), config.data.cache, config.cluster.checkpoints, server, config.cluster.interface)


def _refuse_unreachable(places: Places, nodes: list[dict[str, object]]) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    word, asked = places.probe.read_text(encoding="utf-8"), {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(str(node["NodeID"]), soft=False)
        asked[task.options(scheduling_strategy=here).remote(places, word)] = _name(node)
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=WAIT_S)
    wrong: dict[str, list[str]] = {}
    for reference in done:
        try:
            told = ray.get(reference)
        except Exception as error:  # the node went away, or cannot load nearfar at all
            told = [f"nearfar does not run there ({str(error).strip().splitlines()[-1]}); its image lacks something"]
        for reason in told:
            wrong.setdefault(reason, []).append(asked[reference])
    for reference in late:
        wrong.setdefault(f"no answer within {WAIT_S:g} s: a file system or a server hangs there", []).append(asked[reference])
    if wrong:
        lines = [f"{reason} [{_nodes(names, len(nodes))}]" for reason, names in wrong.items()]
        raise RuntimeError("; ".join(lines))


def _name(node: dict[str, object]) -> str:
    return str(node["NodeManagerAddress"])


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


def _server(uri: str | None) -> list[str]:
    if uri is None:
        return []
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_S):
            return []
    except urllib.error.HTTPError:
        return []  # somebody answers; whether it lets us in, the driver finds out
    except (OSError, ValueError) as error:
        parts = urlsplit(uri)
        return [f"tracking.uri: nobody answers at {parts.scheme}://{parts.hostname}:{parts.port or 80} ({error})"]


def _interface(name: str | None) -> list[str]:
    try:
        interfaces.refuse_unknown(name)
    except ValueError as error:
        return [str(error)]
    return []
