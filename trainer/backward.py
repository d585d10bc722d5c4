"""One step's gradients: the whole batch at once, or piece by piece with the same result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.batch import Batch
from trainer import ranges
from trainer.encoding import Members, cut, encode_members, joined, members_of
from trainer.family import Stats
from trainer.frozen import with_frozen


def backward(
    encoder: nn.Module,
    objective: nn.Module,
    images: Tensor,
    batch: Batch,
    *,
    pieces: Sequence[int] | None = None,
    autocast: torch.dtype | None = None,
    scale: float | None = None,
    **extra: Any,
) -> tuple[Tensor, Stats]:
    """Add the gradient of the global mean loss to the parameters; returns the loss and its statistics.

    `images` [k, 3, H, W] float; `extra` goes to the objective (`keys`, `target`, `step`, `with_stats`).
    `pieces`: numbers of images that sum to k, for the gradient cache (Gao et al. 2021): a pass without graph gives all
    vectors, the objective their gradients, and a second pass back-propagates piece by piece.
    `scale`: what the gradients are multiplied with, for 16 bits.
    Collective: every rank calls it, and each all-reduces the encoder's gradients once.
    """
    if pieces is None or len(pieces) == 1:
        (whole,) = members_of(encoder, [images], batch)
        with ranges.part(ranges.FORWARD), _autocast(images, autocast):
            vectors = encode_members(encoder, whole)
        loss, stats = compare(objective, vectors, batch, **extra)
        with ranges.part(ranges.BACKWARD):
            (loss if scale is None else loss * scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), stats
    states: list[list[Tensor]] = []
    parts = members_of(encoder, torch.split(images, list(pieces)), batch)
    with ranges.part(ranges.FORWARD), torch.no_grad(), _autocast(images, autocast):
        vectors = joined([_forward(encoder, part, states) for part in parts], parts)
    vectors.requires_grad_()
    loss, stats = compare(objective, vectors, batch, **extra)
    with ranges.part(ranges.BACKWARD):
        (loss if scale is None else loss * scale).backward()  # type: ignore[no-untyped-call]
    assert vectors.grad is not None
    for i, (part, grad) in enumerate(zip(parts, cut(vectors.grad, parts), strict=True)):
        last = i == len(parts) - 1
        with _no_sync(encoder) if not last else nullcontext():
            _restore(images.device, states[i])
            with ranges.part(ranges.FORWARD), _autocast(images, autocast):
                again = encode_members(encoder, part)
            with ranges.part(ranges.BACKWARD):
                again.backward(grad)  # type: ignore[no-untyped-call]
    return loss.detach(), stats


def pieces_of(batch: Batch, micro_batch: int | None) -> list[int] | None:
    """Numbers of images in pieces of at most `micro_batch` records; no record is split. Reads `batch` on the host."""
    if micro_batch is None:
        return None
    record = batch.record if batch.place is None else batch.record[batch.place < len(batch.images)]
    return [int(n) for n in torch.unique_consecutive(record // micro_batch, return_counts=True)[1].tolist()]


def compare(objective: nn.Module, vectors: Tensor, batch: Batch, **extra: Any) -> tuple[Tensor, Stats]:
    """The objective for vectors [k, D] of a batch's images, or [n, D] of all that it holds, as `encode` orders them."""
    if extra.get("keys") is not None:
        extra["keys"] = with_frozen(extra["keys"], batch)
    if batch.target is not None:
        extra.setdefault("target", batch.target)
    own = {"uid": batch.uid, "view": batch.view, "record": batch.record, "match": batch.match, "valid": batch.valid}
    with ranges.part(ranges.LOSS):
        value, stats = objective(with_frozen(vectors, batch), batch.group, **own, **extra)
    return value, stats


@torch.no_grad()
def encode(
    encoder: nn.Module,
    images: Tensor,
    pieces: Sequence[int] | None,
    autocast: torch.dtype | None,
    batch: Batch | None = None,
) -> Tensor:
    """Vectors [k, D] of `images` without graph, piece by piece; those of the vectors of `batch` follow if towers take them."""
    parts = members_of(encoder, torch.split(images, list(pieces or [len(images)])), batch)
    with ranges.part(ranges.FORWARD), _autocast(images, autocast):
        return joined([encode_members(encoder, part) for part in parts], parts)


def _autocast(images: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(images.device.type, dtype=dtype)


def _no_sync(encoder: nn.Module) -> AbstractContextManager[object]:
    no_sync = getattr(encoder, "no_sync", None)  # DistributedDataParallel has it, a bare module needs none
    return no_sync() if no_sync is not None else nullcontext()


def _forward(encoder: nn.Module, part: Members, states: list[list[Tensor]]) -> Tensor:
    device = part.images.device
    states.append([torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])])
    return encode_members(encoder, part)


def _restore(device: torch.device, state: list[Tensor]) -> None:
    """Dropout draws the same numbers in both passes."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
