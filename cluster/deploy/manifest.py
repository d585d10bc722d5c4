"""`ray.io/v1` manifests for KubeRay 1.7: a RayJob that trains a config, or a RayCluster to submit to."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from cluster.deploy import pods
from cluster.deploy.documents import Why, dump
from cluster.deploy.wishes import Shape, Wishes, shape_of
from configs.load import dump_config
from configs.schema import RunConfig

START_TIMEOUT_S = 900.0  # pulling an image of some GB, and perhaps starting a node first
TOKEN_KEY = "auth_token"  # where KubeRay looks for Ray's token in a Secret


def ray_job(config: RunConfig, wishes: Wishes) -> str:
    """PersistentVolumeClaim (where a storage class is given), ConfigMap and RayJob, for `kubectl apply -f`."""
    config = _patient(config)
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(wishes, wishes.name),
        "spec": {
            "entrypoint": Why(
                f"python -m cluster.entry {pods.CONFIG_FOLDER}/{pods.CONFIG_FILE} --resume",
                "Begins the run, or goes on from its newest checkpoint where it has one: so a repeated job continues.",
            ),
            "submissionMode": wishes.submission_mode,
            "backoffLimit": Why(
                wishes.backoff_limit,
                "Each time in a new cluster: for a lost head. Lost workers are for cluster.max_failures, and end no job.",
            ),
            "shutdownAfterJobFinishes": Why(True, "Gives the GPUs back; what the run made lies in the claim and in MLflow."),
            "ttlSecondsAfterFinished": Why(wishes.ttl_s, "So long the pods stay, for a look at their logs."),
            "rayClusterSpec": _cluster_spec(config, wishes, shape_of(config, wishes), with_config=True),
        },
    }
    return dump([*_claim(wishes), _config_map(config, wishes), job])


def ray_cluster(config: RunConfig, wishes: Wishes) -> str:
    """PersistentVolumeClaim (where a storage class is given) and RayCluster."""
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(wishes, wishes.name),
        "spec": _cluster_spec(config, wishes, shape_of(config, wishes), with_config=False),
    }
    return dump([*_claim(wishes), cluster])


def _cluster_spec(config: RunConfig, wishes: Wishes, shape: Shape, *, with_config: bool) -> dict[str, Any]:
    auth: dict[str, Any] = {"mode": "token"}
    if wishes.secret is not None:
        auth["secretName"] = Why(wishes.secret, f"Its key {TOKEN_KEY} holds Ray's token.")
    reason = "Without the token nobody submits jobs, reads logs or connects. "
    reason += "" if wishes.secret else "KubeRay makes it, in a Secret of the cluster's name."
    spec: dict[str, Any] = {
        "rayVersion": Why(version("ray"), "That of the image: head, workers and clients must have the same."),
        "authOptions": Why(auth, reason.strip()),
    }
    if shape.elastic:
        spec["enableInTreeAutoscaling"] = Why(
            True, "Ray Train asks for the most workers and trains with those there are; the curve stays the same."
        )
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": Why(300, "Longer than workers take to start again after a failure."),
        }
    spec["headGroupSpec"] = pods.head(config, wishes, shape, with_config=with_config)
    spec["workerGroupSpecs"] = [pods.workers(config, wishes, shape)]
    return spec


def _config_map(config: RunConfig, wishes: Wishes) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(wishes, f"{wishes.name}-config"),
        "data": {pods.CONFIG_FILE: dump_config(config)},
    }


def _claim(wishes: Wishes) -> list[dict[str, Any]]:
    """The claim, where none is there to be used."""
    if wishes.storage_class is None:
        return []
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": Why(
                _metadata(wishes, wishes.claim), "It holds the runs: `kubectl delete -f` of this file deletes them, too."
            ),
            "spec": {
                "storageClassName": wishes.storage_class,
                "accessModes": Why(["ReadWriteMany"], "Driver and workers of all nodes read and write the run's folder."),
                "resources": {"requests": {"storage": f"{wishes.storage_gib}Gi"}},
            },
        }
    ]


def _metadata(wishes: Wishes, name: str) -> dict[str, Any]:
    where = {} if wishes.namespace is None else {"namespace": wishes.namespace}
    labels = {"app.kubernetes.io/name": "nearfar", "app.kubernetes.io/instance": wishes.name}
    return {"name": name, **where, "labels": labels}


def _patient(config: RunConfig) -> RunConfig:
    """The config that travels; unless it says how long to wait for workers, longer than on one machine."""
    if "start_timeout_s" in config.cluster.model_fields_set:
        return config
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"start_timeout_s": START_TIMEOUT_S})})
