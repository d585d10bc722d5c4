"""Manifests against KubeRay's own schemas, and against what the config asks for."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.deploy.dockerfile import ON_PATH, SOURCES
from cluster.deploy.documents import Why, dump, plain
from cluster.deploy.pods import HEAD_SHM_GIB, OBJECT_STORE, SECRETS
from cluster.deploy.refusals import dns_label
from configs.load import load_config
from tests.conftest import Answer

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT.parent / "shared" / "crd"
Nearfar = Callable[..., Answer]

CONFIG = """
name: emoji
data: {train: /shared/shards/train, eval: /shared/shards/eval, batch: 256, per_class: 2}
loss: {name: info_nce}
train: {steps: 100}
cluster: {workers: 2, storage: /shared/runs}
tracking: {uri: "http://mlflow.tracking:5000", register: emoji}
"""
GPUS = ("cluster.gpus_per_worker=1", "cluster.cpus_per_worker=12", "data.threads=12")
CASES: dict[str, tuple[str, ...]] = {
    "cpus": (),
    "half a CPU each": ("cluster.cpus_per_worker=0.5", "cluster.workers=3"),
    "a node of 8 GPUs": ("cluster.workers=8", *GPUS),
    "12 on two nodes": ("cluster.workers=12", *GPUS),
    "elastic": ("cluster.workers=[8,32]", *GPUS),
    "elastic, 2 GPUs each": ("cluster.workers=[1,6]", *GPUS, "cluster.gpus_per_worker=2", "cluster.interface=net1"),
    "all at URLs": (
        *("cluster.checkpoints=s3://bucket/checkpoints", "data.train=s3://bucket/train", "data.eval=https://host/eval"),
        *("data.cache=/scratch/blocks", "data.cache_gb=200"),
    ),
    "untracked": ("tracking={enabled: false}",),
}
OPTIONS = ("--image", "registry.example/team/nearfar:1.2", "--storage-claim", "team-storage", "--secret", "nearfar")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def settings(pairs: tuple[str, ...]) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


def made(nearfar: Nearfar, kind: str, config: Path, pairs: tuple[str, ...] = (), options: tuple[str, ...] = OPTIONS) -> str:
    answer = nearfar("deploy", kind, config, *settings(pairs), *options)
    assert answer.code == 0, answer.err
    return answer.out


def documents(text: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.load_all(text, Loader=yaml.CSafeLoader)}


def cluster_of(found: dict[str, Any]) -> Any:
    return found["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in found else found["RayCluster"]["spec"]


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Any]]:
    return {}


@pytest.fixture
def manifest(nearfar: Nearfar, config: Path, cases: dict[str, dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """The documents of a case, made once."""

    def of(case: str) -> dict[str, Any]:
        if case not in cases:
            cases[case] = documents(made(nearfar, "kuberay", config, CASES[case]))
        return cases[case]

    return of


@functools.cache
def validator(kind: str) -> Any:
    path = SCHEMAS / f"{kind.lower()}s.v1.schema.json"
    if not path.exists():
        pytest.skip(f"no schemas of KubeRay in {SCHEMAS}")
    return jsonschema.Draft202012Validator(json.loads(path.read_text()))


def gib(text: str) -> int:
    assert text.endswith("Gi")
    return int(text[:-2])


def refuse_invalid(resource: dict[str, Any]) -> None:
    errors = [f"{list(error.absolute_path)}: {error.message}" for error in validator(resource["kind"]).iter_errors(resource)]
    assert not errors
    assert resource["apiVersion"] == "ray.io/v1"


@pytest.mark.parametrize("case", CASES)
def test_a_job_fits_the_schema_of_kuberay(manifest: Callable[[str], dict[str, Any]], case: str) -> None:
    refuse_invalid(manifest(case)["RayJob"])


@pytest.mark.parametrize("case", ["cpus", "elastic"])
def test_a_cluster_fits_the_schema_of_kuberay(nearfar: Nearfar, config: Path, case: str) -> None:
    options = (*OPTIONS[:2], "--storage-class", "nfs", "--namespace", "team", "--name", "shared-cluster")
    found = documents(made(nearfar, "ray-cluster", config, CASES[case], options))
    refuse_invalid(found["RayCluster"])
    assert found["RayCluster"]["metadata"]["name"] == "shared-cluster"
    assert {document["metadata"]["namespace"] for document in found.values()} == {"team"}


def test_the_schema_would_tell() -> None:
    broken = {"spec": {"headGroupSpec": {"template": {"spec": {"containers": [{"name": "a", "imagePolicy": "x"}]}}}}}
    assert list(validator("RayCluster").iter_errors(broken))


@pytest.mark.parametrize("case", CASES)
def test_pods_hold_the_workers_that_the_config_asks_for(
    manifest: Callable[[str], dict[str, Any]], config: Path, case: str
) -> None:
    wanted = load_config(config, CASES[case]).cluster
    cluster = cluster_of(manifest(case))
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"] == limits
    cpus = float(limits["cpu"][:-1]) / 1000 if limits["cpu"].endswith("m") else float(limits["cpu"])
    each = min(
        cpus / wanted.cpus_per_worker,
        limits["nvidia.com/gpu"] / wanted.gpus_per_worker if wanted.gpus_per_worker else float("inf"),
    )
    assert each == int(each)
    assert limits.get("nvidia.com/gpu", 0) <= 8
    for pods, workers in ((group["minReplicas"], wanted.least_workers), (group["maxReplicas"], wanted.most_workers)):
        assert workers <= pods * each < workers + each
    elastic = wanted.least_workers < wanted.most_workers
    assert cluster.get("enableInTreeAutoscaling", False) is elastic
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert (group["replicas"] < group["maxReplicas"]) is elastic
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("case", CASES)
def test_a_pod_has_memory_time_and_names(manifest: Callable[[str], dict[str, Any]], config: Path, case: str) -> None:
    wanted = load_config(config, CASES[case]).cluster
    cluster = cluster_of(manifest(case))
    head, worker = cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]
    for pod in (head, worker):
        (container,) = pod["containers"]
        shm = next(volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["medium"] == "Memory"
        assert gib(shm["sizeLimit"]) * 2**30 > OBJECT_STORE
        assert gib(shm["sizeLimit"]) < gib(container["resources"]["limits"]["memory"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] or "")
        assert 30 <= drain <= pod["terminationGracePeriodSeconds"] - 15
        assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == (wanted.interface or "eth0")
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["restartPolicy"] == "Never"
    assert HEAD_SHM_GIB * 2**30 > OBJECT_STORE


def test_the_job_trains_the_config_that_travels_and_goes_on(nearfar: Nearfar, config: Path) -> None:
    found = documents(made(nearfar, "kuberay", config, ("train.steps=77", "optim.lr=3e-4")))
    spec = found["RayJob"]["spec"]
    program, module, name, path, resume = spec["entrypoint"].split()
    assert (program, module, name, resume) == ("python", "-m", "cluster.entry", "--resume")
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    volume = next(volume for volume in head["volumes"] if "configMap" in volume)
    mount = next(m for m in head["containers"][0]["volumeMounts"] if m["name"] == volume["name"])
    assert volume["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    (key,) = found["ConfigMap"]["data"]
    assert f"{mount['mountPath']}/{key}" == path
    config.write_text(found["ConfigMap"]["data"][key])
    travelling = load_config(config)
    config.write_text(CONFIG)
    given = load_config(config, ["train.steps=77", "optim.lr=3e-4"])
    patient = given.cluster.model_copy(update={"start_timeout_s": travelling.cluster.start_timeout_s})
    assert travelling.cluster.start_timeout_s > given.cluster.start_timeout_s
    assert travelling == given.model_copy(update={"cluster": patient})
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "nearfar"}


def test_secrets_are_named_and_never_written(nearfar: Nearfar, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SECRETS, "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "dont-tell")
    text = made(nearfar, "kuberay", config)
    assert "dont-tell" not in text
    for group in (cluster_of(documents(text))["headGroupSpec"], cluster_of(documents(text))["workerGroupSpecs"][0]):
        environment = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        for name in SECRETS:
            reference = environment[name]["valueFrom"]["secretKeyRef"]
            assert reference == {"name": "nearfar", "key": name, "optional": True}
    bare = made(nearfar, "kuberay", config, options=OPTIONS[:4])
    assert "secretKeyRef" not in bare
    assert cluster_of(documents(bare))["authOptions"] == {"mode": "token"}


def test_storage_is_shared_and_holds_the_run(nearfar: Nearfar, config: Path) -> None:
    found = documents(made(nearfar, "kuberay", config, options=(*OPTIONS[:2], "--storage-class", "nfs", "--storage-gib", "7")))
    claim = found["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "7Gi"
    cluster = cluster_of(found)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volume = next(v for v in pod["volumes"] if "persistentVolumeClaim" in v)
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        mount = next(m for m in pod["containers"][0]["volumeMounts"] if m["name"] == volume["name"])
        assert load_config(config).cluster.storage.startswith(f"{mount['mountPath']}/")
    cached = cluster_of(documents(made(nearfar, "kuberay", config, CASES["all at URLs"])))["workerGroupSpecs"][0]["template"][
        "spec"
    ]
    cache = next(volume["emptyDir"] for volume in cached["volumes"] if volume["name"] == "cache")
    assert int(cache["sizeLimit"].removesuffix("G")) > 200


REFUSED: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
    (("tracking.uri=sqlite:////shared/mlflow.db",), (), "tracking.uri: sqlite is for one machine"),
    (("tracking={register: emoji}",), (), "tracking.uri: sqlite is for one machine"),
    (("tracking.uri=http://me:hunter2@mlflow:5000",), (), "tracking.uri holds a password"),
    (("data.train=https://host/shards?token=hunter2",), (), "data.train: 'token' in its query looks like a secret"),
    (("cluster.storage=runs",), (), "--set cluster.storage=/shared/runs"),
    (("cluster.storage=/data/runs",), (), "cluster.storage '/data/runs' is no absolute path in /shared"),
    (("cluster.storage=/shared/../data",), (), "is no absolute path in /shared"),
    (("cluster.checkpoints=/local/checkpoints",), (), "cluster.checkpoints '/local/checkpoints'"),
    (("data.train=shards/train",), (), "data.train 'shards/train' is relative"),
    (("data.eval=shards/eval",), (), "data.eval 'shards/eval' is relative"),
    (("data.cache=cache",), (), "data.cache 'cache' is relative"),
    (("encoder={name: convnet, init: runs/before}",), (), "encoder.init 'runs/before' is relative"),
    (("cluster.gpus_per_worker=4",), ("--gpus-per-node", "2"), "cluster.gpus_per_worker 4 is more than the 2 of a node"),
    (("cluster.gpus_per_worker=0.5",), (), "NCCL wants whole GPUs"),
    (("name=Emoji_v2.1",), (), "add --name emoji-v2-1"),
    (("name=7days",), (), "add --name run-7days"),
    ((), ("--name", "a" * 48), f"add --name {'a' * 47}"),
    ((), ("--image", "nearfar"), "--image nearfar has no tag"),
    ((), ("--image", "host:5000/nearfar"), "has no tag"),
    ((), ("--image", "nearfar:latest"), "what `latest` is changes"),
    ((), ("--mount", "shared"), "--mount 'shared': give an absolute folder"),
    ((), ("--storage-class", "nfs"), "give either --storage-claim"),
    ((), ("--submission-mode", "HttpMode"), "--submission-mode 'HttpMode' is none of K8sJobMode"),
    ((), ("--submission-mode", "InteractiveMode"), "add --backoff-limit 0"),
    ((), ("--grace-s", "20"), "give at least 60"),
    ((), ("--namespace", "Team A"), "--namespace 'Team A' is no name of a Kubernetes object"),
]


@pytest.mark.parametrize(("pairs", "options", "words"), REFUSED, ids=lambda value: " ".join(value) if len(value) < 4 else value)
def test_what_cannot_work_is_refused(
    nearfar: Nearfar, config: Path, pairs: tuple[str, ...], options: tuple[str, ...], words: str
) -> None:
    answer = nearfar("deploy", "kuberay", config, *OPTIONS, *settings(pairs), *options)
    assert answer.code == 2
    assert answer.out == ""
    assert words in answer.err
    assert "hunter2" not in answer.err


def test_all_that_is_wrong_is_told_at_once(nearfar: Nearfar, config: Path) -> None:
    answer = nearfar("deploy", "kuberay", config, "--image", "nearfar", *settings(("cluster.storage=runs", "data.train=x")))
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1 + 4


@pytest.mark.parametrize("image", ["nearfar:1", "host:5000/a/nearfar:1.0-cuda", "nearfar@sha256:" + "0" * 64])
def test_images_that_stay_are_taken(nearfar: Nearfar, config: Path, image: str) -> None:
    found = cluster_of(documents(made(nearfar, "ray-cluster", config, options=("--image", image, *OPTIONS[2:]))))
    assert found["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] == image


def test_a_manifest_goes_to_a_file_with_its_reasons_and_alike_each_time(nearfar: Nearfar, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "job.yaml"
    answer = nearfar("deploy", "kuberay", config, *OPTIONS, "--out", out, "--json")
    assert json.loads(answer.out) == {"kind": "RayJob", "name": "emoji", "out": str(out)}
    assert out.read_text() == made(nearfar, "kuberay", config)
    explained = {key for _, key in re.findall(r"^( *)# .*\n\1([\w-]+):", out.read_text(), re.MULTILINE)}
    assert explained >= {"terminationGracePeriodSeconds", "backoffLimit", "entrypoint", "num-cpus", "emptyDir", "rayVersion"}
    assert max(len(line) for line in out.read_text().splitlines() if line.lstrip().startswith("#")) <= 120


def test_reasons_are_comments_and_change_no_value() -> None:
    tree = {
        "text": "two\nlines # no comment\n",
        "number": Why("0", "It is text. " * 20),
        "list": [{"first": Why(1, "in a list"), "second": Why({"deep": Why(None, "deeper")}, "of a mapping")}],
    }
    text = dump([tree, {"b": 1, "a": Why([], "sorted by nobody")}])
    assert list(yaml.safe_load_all(text)) == [plain(tree), {"b": 1, "a": []}]
    lines = text.splitlines()
    for comment, key in (("in a list", "first: 1"), ("deeper", "deep: null"), ("sorted by nobody", "a: []")):
        place = next(i for i, line in enumerate(lines) if line.lstrip() == f"# {comment}")
        assert lines[place + 1].lstrip(" -") == key
    assert text.index("b: 1") < text.index("a: []")


@pytest.mark.parametrize("name", ["Emoji_v2", "7", "...", "a--", "Ünï", "x" * 90])
def test_the_name_that_is_proposed_is_one(name: str) -> None:
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", dns_label(name, 47))
    assert len(dns_label(name, 47)) <= 47


def instructions(text: str) -> Iterator[tuple[str, str]]:
    whole = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    for line in filter(None, whole.splitlines()):
        yield line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]


def test_the_dockerfile_copies_what_is_there_and_ends_as_nobody_special(nearfar: Nearfar, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "image"
    answer = nearfar("deploy", "dockerfile", config, "--out", out, "--set", "data.train=s3://bucket/x", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["files"] == [str(out / "Dockerfile"), str(out / ".dockerignore")]
    found = list(instructions((out / "Dockerfile").read_text()))
    copied = [source for name, rest in found if name == "COPY" for source in rest.split()[:-1]]
    assert sorted(copied) == sorted(SOURCES)
    assert all((ROOT / source).exists() for source in copied)
    allowed = {line[1:] for line in (out / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == set(copied)
    assert [rest for name, rest in found if name == "USER"] == ["1000"]
    (install,) = [rest for name, rest in found if "pip install" in rest]
    assert "--constraint constraints.txt" in install
    assert "'.[onnx,s3]'" in install
    extras = re.search(r"optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert extras is not None
    assert all(f"\n{extra} = " in extras[1] for extra in ("onnx", "s3"))
    assert all(program in next(rest for _, rest in found if "command -v" in rest) for program in ON_PATH)
    (out / ".dockerignore").write_text("mine\n")
    again = nearfar("deploy", "dockerfile", config, "--out", out)
    assert again.code == 2
    assert "is there and says something else" in again.err
    assert (out / ".dockerignore").read_text() == "mine\n"
