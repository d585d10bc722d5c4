"""The pods of a Ray cluster: one head, which drives, and workers of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from cluster.deploy.documents import Why
from cluster.deploy.wishes import Shape, Wishes
from configs.schema import RunConfig

CONFIG_FOLDER = "/etc/nearfar"
CONFIG_FILE = "config.yaml"
USER = 1000  # as in the image of `nearfar deploy dockerfile`
KILLING_S = 30  # of the grace period, for Ray to end its processes once a node is drained
OBJECT_STORE = 2**30  # bytes; training keeps next to nothing there
HEAD_CPUS, HEAD_GIB, HEAD_SHM_GIB = 4, 16, 2
# What a Secret may hold; keys that it has not are left out.
SECRETS = (
    *("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"),
)


def head(config: RunConfig, wishes: Wishes, shape: Shape, *, with_config: bool) -> dict[str, Any]:
    """The headGroupSpec. `with_config`: the ConfigMap lies in CONFIG_FOLDER."""
    environment = _environment(config, wishes)
    if shape.elastic:
        # New pods need minutes where a node has to be started for them first.
        environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "300"
    pod = _pod(config, wishes, environment, cpus=HEAD_CPUS, memory_gib=HEAD_GIB, shm_gib=HEAD_SHM_GIB, gpus=0)
    if with_config:
        pod["volumes"].append({"name": "config", "configMap": {"name": f"{wishes.name}-config"}})
        mount = {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}
        pod["containers"][0]["volumeMounts"].append(mount)
    pod["containers"][0]["name"] = "ray-head"
    pod["containers"][0]["ports"] = [
        {"containerPort": 6379, "name": "gcs-server"},
        {"containerPort": 8265, "name": "dashboard"},
        {"containerPort": 10001, "name": "client"},
    ]
    return {
        "rayStartParams": {
            "dashboard-host": "0.0.0.0",
            "num-cpus": Why("0", "No worker trains here: the driver checks, exports, registers and reports on these CPUs."),
            "object-store-memory": str(OBJECT_STORE),
        },
        "template": {
            "metadata": {
                "annotations": {
                    "cluster-autoscaler.kubernetes.io/safe-to-evict": Why(
                        "false", "The driver dies with this pod, and the job has to be started again."
                    )
                }
            },
            "spec": pod,
        },
    }


def workers(config: RunConfig, wishes: Wishes, shape: Shape) -> dict[str, Any]:
    """The workerGroupSpec."""
    pod = _pod(
        config,
        wishes,
        _environment(config, wishes),
        cpus=shape.cpus,
        memory_gib=shape.memory_gib,
        shm_gib=shape.shm_gib,
        gpus=shape.gpus,
    )
    pod["containers"][0]["name"] = "ray-worker"
    least, most = config.cluster.least_workers, config.cluster.most_workers
    many = f"{most}" if least == most else f"{least} to {most}"
    return {
        "groupName": "gpu-workers" if shape.gpus else "cpu-workers",
        "replicas": Why(shape.least_pods, f"cluster.workers: {many}, {shape.workers_per_pod} on each pod."),
        "minReplicas": shape.least_pods,
        "maxReplicas": shape.most_pods,
        "rayStartParams": {"object-store-memory": str(OBJECT_STORE)},
        "template": {"spec": {"automountServiceAccountToken": False, **pod}},
    }


def _pod(
    config: RunConfig,
    wishes: Wishes,
    environment: Mapping[str, str],
    *,
    cpus: float,
    memory_gib: int,
    shm_gib: int,
    gpus: int,
) -> dict[str, Any]:
    cache = _cache(config, wishes)
    size: dict[str, Any] = {"cpu": f"{cpus:g}" if cpus == int(cpus) else f"{round(cpus * 1000)}m", "memory": f"{memory_gib}Gi"}
    if gpus:
        size["nvidia.com/gpu"] = gpus
    mounts = [{"name": "shared", "mountPath": wishes.mount}, {"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": wishes.claim}},
        {
            "name": "shm",
            "emptyDir": Why(
                {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"},
                "Kubernetes gives /dev/shm 64 MiB. Ray's object store (1 GiB) lies there, and NCCL's buffers between the GPUs "
                "of a pod. It counts as memory of the container.",
            ),
        },
    ]
    if cache is not None:
        mounts.append({"name": "cache", "mountPath": cache})
        limit = f"{config.data.cache_gb * 1.1 + 1:.0f}G"
        reason = "data.cache on the node's disk: data.cache_gb, and what is being written."
        volumes.append({"name": "cache", "emptyDir": Why({"sizeLimit": limit}, reason)})
    container: dict[str, Any] = {
        "name": "",
        "image": wishes.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [*({"name": k, "value": v} for k, v in environment.items()), *_secrets(wishes)],
        "resources": Why(
            {"requests": dict(size), "limits": dict(size)},
            "Alike, so that Kubernetes evicts others first; Ray counts the limits.",
        ),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {
        "restartPolicy": Why("Never", "KubeRay makes new pods for those that are lost; Ray's autoscaler wants it so."),
        "terminationGracePeriodSeconds": Why(wishes.grace_s, _grace(wishes)),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": Why(USER, "Who may write to the claim."),
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return pod


def _grace(wishes: Wishes) -> str:
    drain = wishes.grace_s - KILLING_S
    return (
        f"On SIGTERM Ray drains the node for {drain} s (RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S): within 4 s every worker knows, "
        f"and all save one checkpoint after the step they are in. {drain - 20} s of writing at 50 MB/s are "
        f"{(drain - 20) * 50 / 1000:g} GB; raise --grace-s for larger ones. The last {KILLING_S} s are for Ray to end."
    )


def _environment(config: RunConfig, wishes: Wishes) -> dict[str, str]:
    interface = config.cluster.interface or "eth0"  # what pods have, with nearly every network
    return {
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(wishes.grace_s - KILLING_S),
        "RAY_JOB_STOP_WAIT_TIME_S": str(wishes.grace_s - KILLING_S),  # a RayJob that is deleted saves, too
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }


def _secrets(wishes: Wishes) -> list[dict[str, Any]]:
    if wishes.secret is None:
        return []
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": wishes.secret, "key": name, "optional": True}}}
        for name in SECRETS
    ]


def _cache(config: RunConfig, wishes: Wishes) -> str | None:
    """`data.cache` where it is a folder of the node."""
    cache = config.data.cache
    if cache is None or PurePosixPath(wishes.mount) in PurePosixPath(cache).parents:
        return None
    return cache
