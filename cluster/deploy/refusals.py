"""What cannot work on a cluster, found before anything is applied there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cluster.deploy.wishes import SUBMISSION_MODES, Wishes
from configs.schema import RunConfig

LONGEST = {"RayJob": 47, "RayCluster": 53}  # KubeRay makes the names of pods and services from it, at most 63 long
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_SECRET = re.compile(r"token|secret|password|passwd|signature|credential|api_?key|^sig$", re.IGNORECASE)


def refuse(config: RunConfig, wishes: Wishes, kind: str) -> None:
    """Raise ValueError with one line for each thing that cannot work as `kind`, "RayJob" or "RayCluster"."""
    found = [
        *_names(wishes, kind),
        *_image(wishes.image),
        *_storage(config, wishes),
        *_data(config),
        *_tracking(config),
        *secrets_in(config),
        *_sizes(config, wishes),
    ]
    if found:
        raise ValueError("\n  ".join([f"this cannot run as a {kind}:", *found]) if len(found) > 1 else found[0])


def notes(config: RunConfig, wishes: Wishes) -> list[str]:
    """What may be meant, but often is not."""
    found = [
        f"{setting} {place} is not in {wishes.mount}, where the claim lies: the image must hold it"
        for setting, place in _read(config)
        if place.startswith("/") and not _within(place, wishes.mount)
    ]
    if config.data.threads > config.cluster.cpus_per_worker:
        found.append(
            f"data.threads {config.data.threads} on cluster.cpus_per_worker {config.cluster.cpus_per_worker:g}: "
            "pods get as many CPUs as that says; raise it"
        )
    return found


def dns_label(name: str, longest: int) -> str:
    """`name` as near as a DNS label can be to it."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"run-{label}"
    return label[:longest].rstrip("-")


def _names(wishes: Wishes, kind: str) -> Iterator[str]:
    longest = LONGEST[kind]
    if not _LABEL.fullmatch(wishes.name) or len(wishes.name) > longest:
        yield (
            f"name {wishes.name!r}: a {kind} is named by a DNS label (a-z, 0-9 and -, a letter first, at most {longest}); "
            f"add --name {dns_label(wishes.name, longest)}, the run keeps its own"
        )
    given = {"--namespace": wishes.namespace, "--secret": wishes.secret, "--storage-claim": wishes.storage_claim}
    for option, name in {**given, "--storage-class": wishes.storage_class}.items():
        if name is not None and not _OBJECT.fullmatch(name):
            yield f"{option} {name!r} is no name of a Kubernetes object (a-z, 0-9, - and .)"
    if wishes.submission_mode not in SUBMISSION_MODES:
        yield f"--submission-mode {wishes.submission_mode!r} is none of {', '.join(SUBMISSION_MODES)}"
    elif wishes.submission_mode == "InteractiveMode" and wishes.backoff_limit:
        yield "--submission-mode InteractiveMode: KubeRay cannot repeat such a job; add --backoff-limit 0"


def _image(image: str) -> Iterator[str]:
    name, _, tag = image.rpartition("/")[2].partition(":")
    if "@sha256:" in image:
        return
    if not name or re.search(r"\s", image):
        yield f"--image {image!r} is no name of an image; give REGISTRY/NAME:TAG"
    elif not tag:
        yield f"--image {image} has no tag, so nodes may run different ones; give {image}:TAG"
    elif tag == "latest":
        yield f"--image {image}: what `latest` is changes, so nodes and restarts may run different ones; give a tag that stays"


def _storage(config: RunConfig, wishes: Wishes) -> Iterator[str]:
    if (wishes.storage_claim is None) == (wishes.storage_class is None):
        yield (
            "the run's folder lies on storage that all pods share: give either --storage-claim (a ReadWriteMany claim that is "
            "there) or --storage-class (one is made)"
        )
    if not PurePosixPath(wishes.mount).is_absolute() or PurePosixPath(wishes.mount) == PurePosixPath("/"):
        yield f"--mount {wishes.mount!r}: give an absolute folder, for instance /shared"
        return
    places = {"cluster.storage": config.cluster.storage, "cluster.checkpoints": config.cluster.checkpoints}
    for setting, place in places.items():
        if place is not None and "://" not in place and not _within(place, wishes.mount):
            inside = PurePosixPath(wishes.mount) / PurePosixPath(place).name
            yield (
                f"{setting} {place!r} is no absolute path in {wishes.mount}, where the claim lies in every pod; "
                f"--set {setting}={inside}, or --mount"
            )


def _data(config: RunConfig) -> Iterator[str]:
    for setting, place in _read(config):
        if not place.startswith("/"):
            yield f"{setting} {place!r} is relative, and pods start in another folder; give an absolute path or a URL"


def _read(config: RunConfig) -> list[tuple[str, str]]:
    """(setting, place) of what pods read from a file system; not what is a URL or has a name in a registry."""
    data = config.data
    many = len(data.train) > 1
    named: list[tuple[str, str | None]] = [
        *((f"data.train.{i}.path" if many else "data.train", source.path) for i, source in enumerate(data.train)),
        ("data.eval", data.eval),
        ("evaluate.gallery", config.evaluate.gallery),
    ]
    if data.cache is not None and not data.cache.startswith("/"):  # an absolute one gets a volume of its own
        named.append(("data.cache", data.cache))
    for where, part in config.encoder.parts().items():
        init = part.init
        named.append((f"{where}.init", None if init is None or init.startswith("models:/") else init))
        for key in ("path", "model"):  # else a name in a hub
            value = part.options.get(key)
            named += [(f"{where}.{key}", value)] if isinstance(value, str) and value.startswith(("/", ".", "~")) else []
    return [(setting, place) for setting, place in named if place is not None and "://" not in place]


def _tracking(config: RunConfig) -> Iterator[str]:
    uri = config.tracking.uri
    if config.tracking.enabled and (uri is None or uri.startswith(("sqlite", "file"))):
        yield (
            "tracking.uri: sqlite is for one machine, and driver and workers run on several; "
            "--set tracking.uri=http://HOST:PORT, or tracking.enabled=false"
        )


def secrets_in(config: RunConfig) -> Iterator[str]:
    """What must not be in a text that many read: a manifest, or what a cluster shows of its jobs."""
    for setting, text in _texts(config.model_dump(mode="json", by_alias=True)):
        parts = urlsplit(text) if "://" in text else None
        if parts is None:
            continue
        named = [name for name, _ in parse_qsl(parts.query) if _SECRET.search(name)]
        if "@" in parts.netloc:
            yield (
                f"{setting} holds a password, and a cluster's manifests and jobs are read by many; leave it out, and give "
                "MLFLOW_TRACKING_USERNAME and _PASSWORD, MLFLOW_TRACKING_URI or AWS_* by the environment (`deploy --secret`, "
                "`submit --env NAME`)"
            )
        elif named:
            yield f"{setting}: {named[0]!r} in its query looks like a secret, which jobs must not show; leave it out"


def _texts(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, str):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, Sequence):
        for index, value in enumerate(tree):
            yield from _texts(value, f"{path}.{index}")


def _sizes(config: RunConfig, wishes: Wishes) -> Iterator[str]:
    gpus = config.cluster.gpus_per_worker
    if gpus > wishes.gpus_per_node:
        yield f"cluster.gpus_per_worker {gpus:g} is more than the {wishes.gpus_per_node} of a node (--gpus-per-node)"
    if gpus != int(gpus):
        yield f"cluster.gpus_per_worker {gpus:g}: NCCL wants whole GPUs for each worker; set 1"
    if wishes.grace_s < 60:
        yield f"--grace-s {wishes.grace_s}: a node's end must leave time for a checkpoint; give at least 60"


def _within(place: str, mount: str) -> bool:
    path, root = PurePosixPath(place), PurePosixPath(mount)
    return path.is_absolute() and ".." not in path.parts and root in (path, *path.parents)
