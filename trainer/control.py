"""What decides whether a step counts and whether the run goes on, alike on every rank and after a resume."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from configs.errors import Unrecoverable
from configs.evaluation import goodness
from configs.schema import Train
from trainer import collectives

FIRST_SCALE, GROW_EVERY = 2.0**16, 2000  # as torch's GradScaler
logger = logging.getLogger(__name__)


class Control(nn.Module):
    """Loss scaling for fp16, steps left out, and the early stop; all it knows is in the state_dict, on the CPU.

    With `watches` false a step is looked at only where it is logged, which costs no sync elsewhere.
    """

    def __init__(self, train: Train) -> None:
        super().__init__()
        self.fp16, self.max_skipped, self.early = train.precision == "fp16", train.max_skipped, train.early_stop
        self.watches = self.fp16 or self.max_skipped > 0
        first = {"scale": FIRST_SCALE if self.fp16 else 1.0, "since_change": 0, "overflows": 0, "skipped": 0}
        first |= {"best": -math.inf, "waited": 0}
        for name, value in first.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied with before backward, or None."""
        return self._get("scale") if self.fp16 else None

    @property
    def ended(self) -> bool:
        """Whether the evaluations have not got better for long enough."""
        return self.early is not None and self._get("waited") >= self.early.patience

    def unscale_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divide the gradients by what the loss was multiplied with."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.fp16 and grads:
            torch._foreach_mul_(grads, 1 / self._get("scale"))

    def accept(self, step: int, loss: Tensor, norm: Tensor, *, look: bool) -> bool:
        """Whether the optimizer may take this step: loss and gradient norm are finite. Collective: every rank calls it.

        `look`: the numbers are needed on the host anyway. Raises Unrecoverable when too many steps were left out.
        """
        if not (self.watches or look):
            return True
        bad = ~torch.isfinite(torch.stack([loss.double(), norm.double()]))
        loss_is, norm_is = (collectives.total(bad.double()) == 0).tolist()  # one rank that differs decides for all
        if loss_is and norm_is:
            self._grow()
            return True
        if self.fp16 and loss_is and self._get("scale") > 1:  # too large for 16 bits: expected, and mended by the scale
            self._set(scale=self._get("scale") / 2, since_change=0, overflows=self._get("overflows") + 1)
            return False
        self._skip(step, loss, norm)
        return False

    def watch(self, numbers: dict[str, float]) -> None:
        """Take note of an evaluation. Collective: every rank calls it."""
        if self.early is None:
            return
        mine = goodness(self.early.metric, numbers.get(f"val/{self.early.metric}", math.nan))
        value = collectives.from_first(lambda: mine)
        if value > self._get("best") + self.early.min_delta:  # the first is better than -inf
            self._set(best=value, waited=0)
        else:
            self._set(waited=self._get("waited") + 1)

    def numbers(self) -> dict[str, float]:
        """For the log."""
        found = {"train/skipped": self._get("skipped")} if self.watches else {}
        return found | ({"train/loss_scale": self._get("scale")} if self.fp16 else {})

    def _skip(self, step: int, loss: Tensor, norm: Tensor) -> None:
        self._set(skipped=self._get("skipped") + 1)
        seen = f"step {step}: loss {float(loss)}, gradient norm {float(norm)}"
        if self._get("skipped") > self.max_skipped:
            so_far = f" ({self.max_skipped} such steps were left out before)" if self.max_skipped else ""
            raise Unrecoverable(
                f"{seen}{so_far}; lower optim.lr, lengthen optim.warmup_steps, set optim.clip_norm or raise train.max_skipped; "
                "the last checkpoint is from before"
            )
        if collectives.rank() == 0:
            logger.warning("%s; left out, %g of at most %d (train.max_skipped)", seen, self._get("skipped"), self.max_skipped)

    def _grow(self) -> None:
        if not self.fp16:
            return
        since = self._get("since_change") + 1
        grown = since >= GROW_EVERY
        self._set(since_change=0 if grown else since, scale=self._get("scale") * (2 if grown else 1))

    def _get(self, name: str) -> float:
        return float(self.get_buffer(name))

    def _set(self, **values: float) -> None:
        for name, value in values.items():
            self.get_buffer(name).fill_(value)
