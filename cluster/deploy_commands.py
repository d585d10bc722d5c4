"""Commands that write what a cluster needs: manifests for KubeRay, and a Dockerfile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.answers import Json, print_result

if TYPE_CHECKING:
    from cluster.deploy.wishes import Wishes
    from configs.schema import RunConfig

deploy = typer.Typer(no_args_is_help=True, help="Write manifests for KubeRay, or a Dockerfile, from a run's config.")
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see `nearfar recipes`.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Where it goes; default: stdout.")]
Image = Annotated[str, typer.Option(metavar="IMAGE:TAG", help="With nearfar inside; see `nearfar deploy dockerfile`.")]
Name = Annotated[str | None, typer.Option(help="Of the Kubernetes objects; default: the run's.")]
Namespace = Annotated[str | None, typer.Option(metavar="NS", help="Default: that of kubectl's context.")]
Secret = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A Secret with auth_token (Ray's), MLFLOW_TRACKING_* and AWS_*, as far as needed."),
]
GpusPerNode = Annotated[int, typer.Option(min=1, help="That a pod can get at most.")]
Claim = Annotated[str | None, typer.Option(metavar="PVC", help="A ReadWriteMany claim that is there; holds runs and data.")]
Class = Annotated[str | None, typer.Option(metavar="CLASS", help="Make a claim of this storage class instead.")]
Size = Annotated[int, typer.Option(min=1, help="Of the claim that is made.")]
Mount = Annotated[str, typer.Option(metavar="DIR", help="Where the claim lies in every pod; cluster.storage is in it.")]
Memory = Annotated[int | None, typer.Option(min=1, help="Of a worker; 32 with a GPU, 4 without if not given.")]
Grace = Annotated[int, typer.Option(help="Seconds from the notice that a pod must go to its end; a checkpoint fits in.")]


@deploy.command()
def kuberay(
    config: Config,
    image: Image,
    overrides: Set = None,
    out: Out = None,
    name: Name = None,
    namespace: Namespace = None,
    secret: Secret = None,
    gpus_per_node: GpusPerNode = 8,
    storage_claim: Claim = None,
    storage_class: Class = None,
    storage_gib: Size = 100,
    mount: Mount = "/shared",
    worker_memory_gib: Memory = None,
    grace_s: Grace = 120,
    backoff_limit: Annotated[int, typer.Option(min=0, help="How often a job that failed goes on in a new cluster.")] = 3,
    ttl_s: Annotated[int, typer.Option(min=0, help="Seconds that the pods of a job that is over stay.")] = 3600,
    submission_mode: Annotated[str, typer.Option(help="K8sJobMode, HTTPMode, SidecarMode or InteractiveMode.")] = "K8sJobMode",
    as_json: Json = False,
) -> None:
    """Write a RayJob that trains the config: for `kubectl apply -f`, with KubeRay 1.7.

    The config travels in a ConfigMap. cluster.workers: [least, most] makes an autoscaling cluster.

    Example: nearfar deploy kuberay mine.yaml --image registry/nearfar:1 --storage-claim shared --secret nearfar
    """
    from cluster.deploy.manifest import ray_job
    from cluster.deploy.wishes import Wishes

    loaded = _load(config, overrides)
    wishes = Wishes(
        image=image,
        name=name or loaded.name,
        namespace=namespace,
        secret=secret,
        gpus_per_node=gpus_per_node,
        storage_claim=storage_claim,
        storage_class=storage_class,
        storage_gib=storage_gib,
        mount=mount,
        worker_memory_gib=worker_memory_gib,
        grace_s=grace_s,
        backoff_limit=backoff_limit,
        ttl_s=ttl_s,
        submission_mode=submission_mode,
    )
    _refuse(loaded, wishes, "RayJob")
    _give(ray_job(loaded, wishes), "RayJob", wishes.name, out, as_json=as_json)


@deploy.command("ray-cluster")
def ray_cluster(
    config: Config,
    image: Image,
    overrides: Set = None,
    out: Out = None,
    name: Name = None,
    namespace: Namespace = None,
    secret: Secret = None,
    gpus_per_node: GpusPerNode = 8,
    storage_claim: Claim = None,
    storage_class: Class = None,
    storage_gib: Size = 100,
    mount: Mount = "/shared",
    worker_memory_gib: Memory = None,
    grace_s: Grace = 120,
    as_json: Json = False,
) -> None:
    """Write a RayCluster of the size that the config asks for; `nearfar submit` sends runs to it.

    Example: nearfar deploy ray-cluster mine.yaml --image registry/nearfar:1 --storage-claim shared --name train
    """
    from cluster.deploy.manifest import ray_cluster as manifest
    from cluster.deploy.wishes import Wishes

    loaded = _load(config, overrides)
    wishes = Wishes(
        image=image,
        name=name or loaded.name,
        namespace=namespace,
        secret=secret,
        gpus_per_node=gpus_per_node,
        storage_claim=storage_claim,
        storage_class=storage_class,
        storage_gib=storage_gib,
        mount=mount,
        worker_memory_gib=worker_memory_gib,
        grace_s=grace_s,
    )
    _refuse(loaded, wishes, "RayCluster")
    _give(manifest(loaded, wishes), "RayCluster", wishes.name, out, as_json=as_json)


@deploy.command()
def dockerfile(
    config: Config,
    overrides: Set = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where Dockerfile and .dockerignore go; default: the first to stdout.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the Dockerfile of an image with nearfar and what this config needs, to be built in the folder of its sources.

    Example: nearfar deploy dockerfile mine.yaml --out .
    """
    from cluster.deploy import dockerfile as made

    loaded = _load(config, overrides)
    if out is not None:
        paths = [str(path) for path in made.write(loaded, out)]
        return print_result({"files": paths}, as_json=as_json, text="\n".join(paths))
    text, ignored = made.dockerfile(loaded), made.dockerignore()
    return print_result({"Dockerfile": text, ".dockerignore": ignored}, as_json=as_json, text=text.rstrip())


def _load(config: Path, overrides: list[str] | None) -> RunConfig:
    from configs.load import load_config

    return load_config(config, overrides or ())


def _refuse(config: RunConfig, wishes: Wishes, kind: str) -> None:
    from cluster.deploy.refusals import notes, refuse
    from cluster.progress import say

    refuse(config, wishes, kind)
    for note in notes(config, wishes):
        say(f"note: {note}")


def _give(manifest: str, kind: str, name: str, out: Path | None, *, as_json: bool) -> None:
    found = {"kind": kind, "name": name, "out": None if out is None else str(out)}
    if out is None:
        return print_result({**found, "manifest": manifest}, as_json=as_json, text=manifest.rstrip())
    from cluster.runfolder import write_atomically

    write_atomically(out, manifest)
    return print_result(found, as_json=as_json, text=f"{out}: kubectl apply -f {out}")
