"""ArcFace: softmax over class centres on the sphere, with an angle added between a vector and its own centre."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from configs.section import Dim
from trainer.centres import Classes, Shard
from trainer.distance import safe_sqrt
from trainer.losses.softmax_head import SoftmaxHead


class ArcFace(SoftmaxHead):
    """-log softmax(scale * c)_y with c_j = cos t_j, and c_y = cos(t_y + margin); mean over valid rows of known classes.

    Beyond t_y = pi - margin, c_y = cos t_y - margin sin(margin), which keeps on falling. `sub_centers`: a class's cosine is
    that of its nearest centre (Deng et al. 2020). `margin_min`: classes get margins by size n, from `margin` for the
    smallest down to `margin_min` for the largest, linear in n^(-1/4) (Ha et al. 2020); set_classes then needs counts.
    Vectors and centres are always unit vectors. Source: Deng et al. 2019, eq. 3.
    """

    cosine = True

    def __init__(
        self,
        num_classes: Classes,
        dim: Dim,
        margin: float = 0.5,
        scale: float = 64.0,
        sub_centers: Annotated[int, Field(ge=1, le=1024)] = 1,
        margin_min: float | None = None,
        shard: Shard = "auto",
    ) -> None:
        super(SoftmaxHead, self).__init__(num_classes, dim, per_class=sub_centers, shard=shard)
        if not 0 <= (margin if margin_min is None else margin_min) <= margin < math.pi:
            raise ValueError(f"loss.margin: angles with 0 <= margin_min <= margin < pi, got {margin_min} and {margin}")
        if not scale > 0:
            raise ValueError(f"loss.scale: must be above 0, got {scale}")
        self.margin, self.margin_min, self.scale = margin, margin_min, scale
        self.margins: Tensor  # of the classes, in the order of `classes`
        self.register_buffer("margins", torch.full((num_classes,), margin))

    def target_logit(self, own: Tensor, label: Tensor) -> Tensor:
        if self.margin_min is None:
            cos_m, sin_m, margin = math.cos(self.margin), math.sin(self.margin), self.margin
            return torch.where(own >= -cos_m, own * cos_m - safe_sqrt(1 - own * own) * sin_m, own - margin * sin_m)
        margins = self.margins[label].to(own.dtype)  # [g]
        cosines, sines = margins.cos(), margins.sin()
        return torch.where(own >= -cosines, own * cosines - safe_sqrt(1 - own * own) * sines, own - margins * sines)

    def _set_counts(self, counts: Tensor | None) -> None:
        if self.margin_min is None:
            return
        if counts is None:
            raise ValueError("loss.margin_min: margins by class size need the classes' counts")
        size = counts.clamp_min(1).double() ** -0.25
        spread = (size.max() - size.min()).clamp_min(1e-12)
        share = torch.where(size.max() > size.min(), (size - size.min()) / spread, torch.ones_like(size))
        self.margins.copy_(self.margin_min + (self.margin - self.margin_min) * share)
