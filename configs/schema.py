"""The run configuration: every setting, its default and its bounds live here and nowhere else."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Sigma = Annotated[float, Field(gt=0.0, le=16.0)]


class Section(BaseModel):
    """Frozen, refuses unknown keys and values of the wrong type."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Part(BaseModel):
    """A pluggable part, `{name, **options}`; the options are checked against the function that `name` stands for."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Encoder(Part):
    """The encoder, with the settings that every one of them takes."""

    init: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="warm start: a run folder, a checkpoint, or models:/name@alias or models:/name/version"
    )
    init_skip: tuple[str, ...] = Field((), description="prefixes of weights that the warm start leaves as they were drawn")
    freeze: Annotated[int, Field(ge=0)] | tuple[str, ...] = Field(
        (), description="prefixes of weights that do not learn, or the number of stages from the input on"
    )
    freeze_batchnorm: bool = Field(False, description="BatchNorm keeps the statistics, scales and biases it came with")


class Augment(Section):
    """Random changes of a training image, each drawn from (seed, epoch, uid, record's row, view)."""

    crop: tuple[Fraction, Fraction] | None = Field(None, description="area range of the random crop, as a share of the image")
    aspect: Annotated[float, Field(ge=1.0, le=4.0)] = Field(4 / 3, description="largest aspect ratio of the crop")
    flip: Fraction = Field(0.0, description="probability of a horizontal flip")
    rotate: Annotated[float, Field(ge=0.0, le=180.0)] = Field(0.0, description="largest rotation, degrees")
    scale: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="zoom by up to 1 +- scale")
    shift: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="largest shift, as a share of the side")
    color: Fraction = Field(0.0, description="strength of brightness, contrast and saturation jitter")
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = Field(0.0, description="largest turn of the hue circle")
    grayscale: Fraction = Field(0.0, description="probability of dropping colour")
    blur: Fraction = Field(0.0, description="probability of a Gaussian blur")
    blur_sigma: tuple[Sigma, Sigma] = Field((0.1, 2.0), description="its range, in pixels of a 224 image; scaled with the size")
    erase: Fraction = Field(0.0, description="probability of erasing a rectangle")

    @field_validator("crop")
    @classmethod
    def _ordered(cls, crop: tuple[float, float] | None) -> tuple[float, float] | None:
        if crop is not None and not 0.0 < crop[0] <= crop[1]:
            raise ValueError(f"crop is [smallest, largest] share of the image's area, both above 0; got {list(crop)}")
        return crop

    @field_validator("blur_sigma")
    @classmethod
    def _widening(cls, sigma: tuple[float, float]) -> tuple[float, float]:
        if sigma[0] > sigma[1]:
            raise ValueError(f"blur_sigma is [smallest, largest]; got {list(sigma)}")
        return sigma


class Source(Section):
    """A data set to train on, and its share where there are several."""

    path: Annotated[str, Field(min_length=1)]
    weight: Positive = Field(1.0, description="share of the records (K-row units) of a batch, relative to the other sources")
    namespace: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")] | None = Field(
        None, description="sources with the same one share classes and groups; without, a source shares them with no other"
    )


class Data(Section):
    """Where images come from and how a batch is made of them."""

    train: Annotated[tuple[Source, ...], Field(min_length=1, max_length=1024)]  # written as one path, or as a list
    eval: str | None = None
    image_size: Annotated[int, Field(ge=8, le=2048)] = 224
    resize: Literal["crop", "pad", "squash"] = Field(
        "crop", description="to a square: centre crop, white borders, or distortion"
    )
    batch: Annotated[int, Field(ge=2)] = Field(256, description="records a step over all workers; images for labelled data")
    per_class: Annotated[int, Field(ge=2)] | None = Field(None, description="K of balanced P x K batches, for labelled data")
    tail: Literal["pad", "drop"] = Field("pad", description="a class run's rest below K: masked duplicates, or left out")
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    prefetch: Annotated[int, Field(ge=1, le=64)] = Field(4, description="batches read ahead")
    augment: Augment = Augment()
    lanes: Annotated[int, Field(ge=1, le=65536)] = 64
    window: Annotated[int, Field(ge=1)] = Field(2048, description="samples (or K-row units) of a lane shuffled together")
    max_bad_fraction: Fraction = Field(0.001, description="unreadable share of the samples seen, above which the run stops")
    max_bad_shard_fraction: Fraction = Field(0.2, description="unreadable share of one shard's images, above which it stops")
    max_pixels: Annotated[int, Field(ge=1)] = Field(100_000_000, description="larger images are refused before decoding")
    timeout_s: Positive = Field(120, description="longest time without any image read, and for a remote block with its retries")
    io_threads: Annotated[int, Field(ge=1, le=256)] = Field(8, description="remote blocks fetched at once, per worker")
    block_mb: Annotated[float, Field(gt=0.0, le=1024.0)] = Field(8, description="MiB of a remote shard fetched at once")
    cache: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="folder for remote blocks, shared by a node's workers; default: one in the temporary folder",
    )
    cache_gb: Positive = Field(50, description="size of that folder, above which the least recently used blocks are removed")

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_more(cls, train: Any) -> Any:
        several = train if isinstance(train, (list, tuple)) else [train]
        return [{"path": one} if isinstance(one, str) else one for one in several]

    @field_serializer("train")
    def _plainly(self, train: tuple[Source, ...]) -> Any:
        alone = len(train) == 1 and train[0].namespace is None
        return train[0].path if alone else [source.model_dump(mode="json") for source in train]


class Optim(Section):
    name: str = "adamw"
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.05, description="of matrices and kernels only")
    betas: tuple[Fraction, Fraction] | None = Field(None, description="adamw ([0.9, 0.98]) and lion ([0.9, 0.99])")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(None, description="sgd and lars (0.9)")
    nesterov: bool | None = Field(None, description="sgd (false)")
    trust: Positive | None = Field(None, description="lars (0.001): length of a step relative to that of the weights")
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="learning rate of a stage of the encoder relative to that of the next"
    )
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="schedule step: steps after which lr falls")
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.1, description="schedule step: what lr is multiplied with there")
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_lr: Fraction = Field(0.0, description="learning rate at the end of cosine and linear, as a share of lr")
    clip_norm: Positive | None = 1.0

    @model_validator(mode="after")
    def _steps_down(self) -> Optim:
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("schedule step and milestones belong together: give both, for instance milestones: [600, 900]")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones are steps, each later than the one before; got {list(self.milestones)}")
        return self


class EarlyStop(Section):
    """Ends a run whose evaluations no longer get better."""

    metric: str = "recall_at_1"
    patience: Annotated[int, Field(ge=1)] = Field(5, description="evaluations without a better one before the run ends")
    min_delta: Annotated[float, Field(ge=0.0)] = Field(0.0, description="by how much an evaluation must be better to count")


class Train(Section):
    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Positive | None = Field(
        None,
        description="in place of steps; an epoch is as many records (units) as all sources hold together when the run starts",
    )
    micro_batch: Annotated[int, Field(ge=1)] | None = Field(None, description="records encoded at once (gradient cache)")
    reproducible: bool = Field(False, description="bit-equal curves at any world size, in pieces of micro_batch records")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    channels_last: bool = Field(False, description="the encoder's kernels and images with channels last in memory")
    compile: bool = Field(False, description="torch.compile the encoder")
    max_skipped: Annotated[int, Field(ge=0)] = Field(
        0, description="steps whose loss or gradient is not finite that are left out; above 0 costs a device sync a step"
    )
    early_stop: EarlyStop | None = None
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="decay of the averaged weights that are evaluated")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="decay of a momentum encoder that makes the candidates"
    )
    log_every: Annotated[int, Field(ge=1)] = 10
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    evaluate_every: Annotated[int, Field(ge=1)] = 500
    keep: Annotated[int, Field(ge=1)] = Field(3, description="newest checkpoints kept")
    keep_best: bool = Field(True, description="also the checkpoint with the largest tracking.promote.metric, if evaluated")

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs (set the other to null)")
        return self

    @model_validator(mode="after")
    def _can_be_reproducible(self) -> Train:
        if self.reproducible and self.micro_batch is None:
            raise ValueError(
                "reproducible: true needs train.micro_batch, records that no two workers share (16 to 64 are usual)"
            )
        if self.reproducible and self.precision not in ("fp32", "bf16"):
            raise ValueError(f"reproducible: true is for train.precision fp32 and bf16, not {self.precision}; set one of them")
        return self

    @property
    def piece(self) -> int:
        """Records that no two workers share: those of a micro-batch when it must be the same anywhere, else 1."""
        return self.micro_batch if self.reproducible and self.micro_batch is not None else 1


class Cluster(Section):
    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        2, description="how many; [least, most] on a cluster that loses and gains nodes: the curve stays"
    )
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0
    cpus_per_worker: Positive = 1
    max_failures: Annotated[int, Field(ge=0)] = 3
    storage: str = "runs"
    checkpoints: str | None = Field(
        None, description="other folder or URL (s3://...) for checkpoints; default: the run's folder"
    )
    timeout_s: Positive = Field(300, description="no collective and no step may take longer")
    start_timeout_s: Positive = Field(120, description="longest wait for the workers to start")

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
    metric: str = "recall_at_1"
    alias: str = "champion"


class Tracking(Section):
    uri: str | None = Field(None, description="MLflow server or database; default: mlflow.db in the storage folder")
    experiment: str = "nearfar"
    register_as: str | None = Field(None, alias="register", description="name in the model registry")
    promote: Promote = Promote()
    enabled: bool = True

    model_config = ConfigDict(populate_by_name=True)


class RunConfig(Section):
    """Everything that decides what a run computes, and where it runs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    encoder: Encoder = Encoder(name="convnet")
    loss: tuple[Part, ...] = (Part(name="info_nce"),)  # written as one mapping, or as a list of them with weights
    optim: Optim = Optim()
    train: Train
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()

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
        if self.encoder.init_skip and self.encoder.init is None:
            raise ValueError("encoder.init_skip: there is no encoder.init whose weights could be skipped")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run computes; the others change where it runs and how fast."""
        tree = self.model_dump(mode="json", include={"seed", "data", "encoder", "loss", "optim", "train"})
        for section, names in _PACE.items():
            for name in names:
                del tree[section][name]
        tree["encoder"].pop("checkpointing", None)  # computes the same twice
        if self.train.early_stop is not None:  # then the evaluations decide when the run ends
            tree["train"]["evaluate_every"] = self.train.evaluate_every
        if self.train.reproducible:  # then also the roundings count
            tree["train"] |= {"reproducible": True, "micro_batch": self.train.micro_batch}
        total = sum(source.weight for source in self.data.train)  # where the sources lie decides nothing
        tree["data"]["train"] = [{"share": s.weight / total, "namespace": s.namespace} for s in self.data.train]
        return tree


_PACE = {
    "data": (
        *("train", "eval", "threads", "prefetch", "max_bad_fraction", "max_bad_shard_fraction", "max_pixels"),
        *("timeout_s", "io_threads", "block_mb", "cache", "cache_gb"),
    ),
    "train": (
        *("micro_batch", "reproducible", "log_every", "checkpoint_every", "evaluate_every", "keep", "keep_best"),
        "max_skipped",
    ),
}
