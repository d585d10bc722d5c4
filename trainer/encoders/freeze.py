"""Parts of an encoder that stay as they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.encoders.stages import matches, stages_of

M = TypeVar("M", bound=nn.Module)


class _Frozen(nn.Module):
    """Mixed into a BatchNorm: it is never in training mode, so its statistics stay."""

    def train(self: M, mode: bool = True) -> M:
        return nn.Module.train(self, False)


def freeze(encoder: nn.Module, what: int | Sequence[str]) -> None:
    """Let the weights under the prefixes `what`, or those of the first `what` stages, not learn; nor BatchNorm there.

    Raises ValueError for a prefix or number that fits nothing, or when nothing is left to learn.
    """
    stages = stages_of(encoder)
    if isinstance(what, int) and what > len(stages):
        raise ValueError(f"encoder.freeze: {what} stages of {len(stages)}; name at most that many")
    prefixes = [prefix for stage in stages[:what] for prefix in stage] if isinstance(what, int) else list(what)
    names = [name for name, _ in encoder.named_parameters()]
    for prefix in prefixes:
        if not any(matches(name, [prefix]) for name in names):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
            raise ValueError(f"encoder.freeze: no weights under {prefix!r}; there are {known}")
    for name, parameter in encoder.named_parameters():
        if matches(name, prefixes):
            parameter.requires_grad_(False)
    for name, part in encoder.named_modules():
        if isinstance(part, _BatchNorm) and matches(name, prefixes):
            _hold(part)
    if not any(p.requires_grad for p in encoder.parameters()):
        raise ValueError("encoder.freeze: nothing of the encoder is left to learn; freeze fewer stages")


def freeze_batchnorm(encoder: nn.Module) -> None:
    """Let every BatchNorm keep its statistics, scales and biases: each image is then encoded by itself."""
    for part in encoder.modules():
        if isinstance(part, _BatchNorm):
            part.requires_grad_(False)
            _hold(part)


def freeze_unused(encoder: nn.Module, image_size: int) -> None:
    """Let the weights that an image's vector does not depend on not learn: DDP would wait for their gradients.

    Encodes one image. Raises ValueError when the encoder cannot take its size.
    """
    was_training, learning = encoder.training, [p for p in encoder.parameters() if p.requires_grad]
    try:
        vectors = encoder.eval()(torch.zeros(1, 3, image_size, image_size))
        grads = torch.autograd.grad(vectors.sum(), learning, allow_unused=True)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"data.image_size: the encoder does not take {image_size} pixels: {error}") from error
    finally:
        encoder.train(was_training)
    for p, grad in zip(learning, grads, strict=True):
        p.requires_grad_(grad is not None)


def depends_on_batch(part: nn.Module) -> bool:
    """Whether a module is a BatchNorm that takes its statistics from the batch."""
    return isinstance(part, _BatchNorm) and not isinstance(part, _Frozen)


def _hold(part: nn.Module) -> None:
    if not isinstance(part, _Frozen):
        kind = type(part)
        part.__class__ = type(f"Frozen{kind.__name__}", (_Frozen, kind), {})  # keeps names, tensors and a subclass's ways
    part.eval()
