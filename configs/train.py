"""The train section: how long, how precisely, and what is written down on the way."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from configs.evaluation import require_ranking
from configs.section import Decay, Records, Section, Steps


class EarlyStop(Section):
    """Ends a run whose evaluations no longer get better."""

    metric: Annotated[str, AfterValidator(require_ranking)] = "recall_at_1"
    patience: Steps = Field(5, description="evaluations without a better one before the run ends")
    min_delta: Annotated[float, Field(ge=0.0)] = Field(0.0, description="by how much an evaluation must be better to count")


class Train(Section):
    steps: Steps | None = None
    epochs: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(
        None,
        description="in place of steps; an epoch is as many records (units) as all sources hold together when the run starts",
    )
    micro_batch: Records | None = Field(None, description="records encoded at once (gradient cache)")
    reproducible: bool = Field(False, description="bit-equal curves at any world size, in pieces of micro_batch records")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    channels_last: bool = Field(False, description="the encoder's kernels and images with channels last in memory")
    compile: bool = Field(False, description="torch.compile the encoder")
    max_skipped: Annotated[int, Field(ge=0, le=10**9)] = Field(
        0, description="steps whose loss or gradient is not finite that are left out; above 0 costs a device sync a step"
    )
    early_stop: EarlyStop | None = None
    ema: Decay = Field(0.0, description="decay of the averaged weights that are evaluated")
    momentum: Decay = Field(0.0, description="decay of a momentum encoder that makes the candidates")
    log_every: Steps = 10
    checkpoint_every: Steps = 500
    evaluate_every: Steps = 500
    keep: Annotated[int, Field(ge=1, le=10**6)] = Field(3, description="newest checkpoints kept")
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
