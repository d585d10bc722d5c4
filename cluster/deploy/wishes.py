"""What a deployment is to be, beside the config: image, storage, names, sizes; and how workers lie on pods."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import RunConfig

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")


@dataclass(frozen=True, slots=True)
class Wishes:
    """`mount` is where the claim lies in every pod; memory in GiB; `grace_s`: seconds between SIGTERM and SIGKILL of a pod."""

    image: str
    name: str
    namespace: str | None = None
    secret: str | None = None
    gpus_per_node: int = 8
    storage_claim: str | None = None
    storage_class: str | None = None
    storage_gib: int = 100
    mount: str = "/shared"
    worker_memory_gib: int | None = None
    grace_s: int = 120
    backoff_limit: int = 3
    ttl_s: int = 3600
    submission_mode: str = "K8sJobMode"

    @property
    def claim(self) -> str:
        """The claim that pods mount: one that is there, or the one that the manifest makes."""
        return self.storage_claim or f"{self.name}-storage"


@dataclass(frozen=True, slots=True)
class Shape:
    """`most_pods` pods of `workers_per_pod`; least_pods < most_pods for an elastic run."""

    workers_per_pod: int
    least_pods: int
    most_pods: int
    cpus: float  # of a pod
    gpus: int  # of a pod
    memory_gib: int  # of a pod, with `shm_gib`
    shm_gib: int  # of a pod

    @property
    def elastic(self) -> bool:
        return self.least_pods < self.most_pods


def shape_of(config: RunConfig, wishes: Wishes) -> Shape:
    """As few pods as the GPUs of a node allow, alike all of them; without GPUs a pod for each worker."""
    cluster = config.cluster
    gpus = int(cluster.gpus_per_worker)
    fit = wishes.gpus_per_node // gpus if gpus else 1
    most_pods = math.ceil(cluster.most_workers / fit)
    each = math.ceil(cluster.most_workers / most_pods)
    memory = wishes.worker_memory_gib or (32 if gpus else 4)
    shm = 1 + each
    return Shape(
        workers_per_pod=each,
        least_pods=math.ceil(cluster.least_workers / each),
        most_pods=most_pods,
        cpus=each * cluster.cpus_per_worker,
        gpus=each * gpus,
        memory_gib=each * memory + shm,
        shm_gib=shm,
    )
