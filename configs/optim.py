"""The optim section: optimizer, learning rate and schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.section import Decay, Fraction, Positive, Section


class Optim(Section):
    name: str = "adamw"
    lr: Annotated[float, Field(gt=0.0, le=1000.0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0, le=100.0)] = Field(0.05, description="of matrices and kernels only")
    betas: tuple[Decay, Decay] | None = Field(None, description="adamw ([0.9, 0.98]) and lion ([0.9, 0.99])")
    momentum: Decay | None = Field(None, description="sgd and lars (0.9)")
    nesterov: bool | None = Field(None, description="sgd (false)")
    trust: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="lars (0.001): length of a step relative to that of the weights"
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="learning rate of a stage of the encoder relative to that of the next"
    )
    loss_lr: Annotated[float, Field(gt=0.0, le=1e6)] = Field(
        1.0, description="learning rate of the loss's own parameters relative to lr; class centres often want 10 to 100"
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
