"""The run configuration: every setting, its default and its bounds live here and in the sections' files, nowhere else."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, field_serializer, field_validator, model_validator

from configs.data import Augment, Data, Source
from configs.encoder import Encoder, Tower
from configs.evaluation import Evaluate, expand, require_ranking
from configs.optim import Optim
from configs.section import Part, Place, Seconds, Section
from configs.train import EarlyStop, Train

__all__ = [
    "Augment",
    "Cluster",
    "Data",
    "EarlyStop",
    "Encoder",
    "Evaluate",
    "Finish",
    "Optim",
    "Part",
    "Promote",
    "RunConfig",
    "Section",
    "Source",
    "Tower",
    "Tracking",
    "Train",
]


class Cluster(Section):
    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        2, description="how many; [least, most] on a cluster that loses and gains nodes: the curve stays"
    )
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0
    cpus_per_worker: Annotated[float, Field(gt=0.0, le=1024.0)] = 1
    max_failures: Annotated[int, Field(ge=0)] = 3
    storage: Place = "runs"
    checkpoints: Place | None = Field(
        None, description="other folder or URL (s3://...) for checkpoints; default: the run's folder"
    )
    timeout_s: Seconds = Field(300, description="no collective and no step may take longer")
    start_timeout_s: Seconds = Field(120, description="longest wait for the workers to start")
    interface: Annotated[str, Field(pattern=r"^[!-.0-~]{1,15}$")] | None = Field(
        None, description="network interface over which workers talk (eth0, ib0, lo); default: gloo and NCCL choose"
    )
    placement: Literal["pack", "spread"] = Field("pack", description="workers on as few nodes as will do, or on as many")

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @field_validator("workers")
    @classmethod
    def _in_order(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(workers, int) and workers[0] > workers[1]:
            raise ValueError(f"[least, most] is meant, but {workers[0]} is more than {workers[1]}")
        return workers

    @field_validator("storage")
    @classmethod
    def _on_a_disk(cls, storage: str) -> str:
        if "://" in storage:
            raise ValueError(
                f"{storage!r} is a URL; name a folder that all nodes share, and give the URL to cluster.checkpoints"
            )
        return storage


class Promote(Section):
    metric: Annotated[str, AfterValidator(require_ranking)] = "recall_at_1"
    alias: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,250}$")] = "champion"


class Tracking(Section):
    uri: Place | None = Field(None, description="MLflow server or database; default: mlflow.db in the storage folder")
    experiment: Annotated[str, Field(pattern=r"\S", max_length=250)] = "nearfar"
    register_as: Annotated[str, Field(max_length=250)] | None = Field(
        None, alias="register", description="name in the model registry"
    )
    promote: Promote = Promote()
    enabled: bool = True

    model_config = ConfigDict(populate_by_name=True)


class Finish(Section):
    """What a run leaves behind besides its metrics and its exported encoder."""

    report: bool = Field(True, description="the HTML report; `nearfar report RUN` writes it later, too")
    onnx: bool = Field(True, description="an export that runs without torch; `nearfar export RUN` makes one later, too")


class RunConfig(Section):
    """Everything that decides what a run computes, and where it runs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    encoder: Encoder = Encoder(name="convnet")
    loss: tuple[Part, ...] = (Part(name="info_nce"),)  # written as one mapping, or as a list of them with weights
    optim: Optim = Optim()
    train: Train
    evaluate: Evaluate = Evaluate()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()
    finish: Finish = Finish()

    @field_validator("loss", mode="before")
    @classmethod
    def _one_or_more(cls, loss: Any) -> Any:
        return [loss] if isinstance(loss, (dict, Part)) else loss

    @field_serializer("loss")
    def _plainly(self, loss: tuple[Part, ...]) -> Any:
        plain = [part.model_dump(mode="json") for part in loss]
        return plain[0] if len(plain) == 1 else plain

    @model_validator(mode="after")
    def _batch_arithmetic(self) -> RunConfig:
        k, batch, world = self.data.per_class, self.data.batch, self.cluster.most_workers
        units = batch if k is None else batch // k
        if k is not None and batch % k:
            raise ValueError(f"data.batch {batch} is not a multiple of data.per_class {k}; try {math.ceil(batch / k) * k}")
        if k is not None and units < 2:
            raise ValueError(f"data.batch {batch} holds one class of {k}: nothing to be a negative; use at least {2 * k}")
        if world > units:
            raise ValueError(f"cluster.workers {world} is more than the {units} units of a batch; lower it or raise data.batch")
        if self.train.micro_batch is not None and k is not None and self.train.micro_batch % k:
            raise ValueError(f"train.micro_batch {self.train.micro_batch} is not a multiple of data.per_class {k}")
        if self.train.reproducible and world > math.ceil(batch / self.train.piece):
            raise ValueError(
                f"cluster.workers {world} cannot share data.batch {batch} in pieces of train.micro_batch {self.train.piece}, "
                "which train.reproducible never splits; lower train.micro_batch or cluster.workers"
            )
        return self

    @model_validator(mode="after")
    def _feasible(self) -> RunConfig:
        if self.train.precision == "fp16" and self.cluster.gpus_per_worker == 0:
            raise ValueError("train.precision: fp16 needs GPUs (cluster.gpus_per_worker: 1); on CPUs use bf16 or fp32")
        if self.train.early_stop is not None and self.data.eval is None:
            raise ValueError("train.early_stop: there is nothing to evaluate; give data.eval")
        if self.evaluate.gallery is not None and self.data.eval is None:
            raise ValueError("evaluate.gallery: there are no queries; give data.eval")
        for key, tower in self.encoder.parts().items():
            if tower.init_skip and tower.init is None:
                raise ValueError(f"{key}.init_skip: there is no {key}.init whose weights could be skipped")
        return self

    def metrics(self, *, at_end: bool) -> tuple[str, ...]:
        """What an evaluation measures, with what decides about the run: the early stop, the best checkpoint, the promotion."""
        early = () if self.train.early_stop is None else (self.train.early_stop.metric,)
        more = self.evaluate.at_end if at_end else ()
        return expand((*self.evaluate.metrics, *more, self.tracking.promote.metric, *early))

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run computes; the others change where it runs and how fast."""
        tree = self.model_dump(mode="json", include={"seed", "data", "encoder", "loss", "optim", "train"})
        for section, names in _PACE.items():
            for name in names:
                del tree[section][name]
        for part in (tree["encoder"], tree["encoder"].get("anchor"), tree["encoder"].get("positive")):
            if isinstance(part, dict):
                part.pop("checkpointing", None)  # computes the same twice
                if part.get("name") == "projection":  # the data decides it
                    part.pop("input_dim", None)
        if self.train.early_stop is not None:  # then the evaluations decide when the run ends
            tree["train"]["evaluate_every"] = self.train.evaluate_every
            if self.evaluate.across is not None:
                tree["evaluate"] = self.evaluate.model_dump(mode="json", include={"across", "across_hides"})
            if self.evaluate.queries != "all":
                tree["evaluate"] = {**tree.get("evaluate", {}), "queries": self.evaluate.queries}
        if self.train.reproducible:  # then also the roundings count
            tree["train"] |= {"reproducible": True, "micro_batch": self.train.micro_batch}
        total = sum(source.weight for source in self.data.train)  # where the sources lie decides nothing
        tree["data"]["train"] = [{"share": s.weight / total, "namespace": s.namespace} for s in self.data.train]
        return tree


_PACE = {
    "data": (
        *("train", "eval", "threads", "prefetch", "decoded_mb", "max_bad_fraction", "max_bad_shard_fraction", "max_pixels"),
        *("timeout_s", "io_threads", "block_mb", "cache", "cache_gb", "check_duplicates"),
    ),
    "train": (
        *("micro_batch", "reproducible", "log_every", "checkpoint_every", "evaluate_every", "keep", "keep_best"),
        "max_skipped",
    ),
}
