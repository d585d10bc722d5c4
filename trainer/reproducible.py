"""Gradients, and all else a step computes, that are the same bit for bit on any number of ranks and threads.

Two sums of floats in another order differ, and training blows such differences up; so nothing may depend on who computes it:

    images    in pieces, each a fixed share of the batch that no rank splits: every kernel sees the same shapes
    the loss  over the vectors of all ranks, whole, by every rank: it has no collective in it, and every loss will do
    gradients of the pieces added up in float64, where sums of float32 terms are exact, so that their order does not matter
              (terms 2^29 times smaller than others lose bits, of which the float32 result shows one in about 2^29)

Dropout's numbers belong to (seed, step, piece). `kernels` holds back what would change sums inside one kernel.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import Unrecoverable
from pipelines.batch import Batch
from trainer import collectives, ranges
from trainer.encoding import Members, cut, encode_members, joined, members_of
from trainer.family import Stats
from trainer.frozen import with_frozen


@contextmanager
def kernels() -> Iterator[None]:
    """One thread inside of an operation, and only deterministic kernels. Enter it before the GPU is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    tuned = torch.backends.cudnn.benchmark
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        torch.backends.cudnn.benchmark = tuned


@dataclass(frozen=True, slots=True)
class Step:
    """What the pieces of a step need to know of it."""

    number: int
    seed: int
    autocast: torch.dtype | None = None
    with_stats: bool = True


def prepared(batch: Batch, pieces: Sequence[int], prepare: Callable[[Batch], Tensor]) -> list[Tensor]:
    """The images of every piece, augmented, each in memory of its own: where a tensor begins may decide how it is summed."""
    parts = zip(torch.split(batch.images, list(pieces)), torch.split(batch.draws, list(pieces)), strict=True)
    return [prepare(replace(batch, images=images, draws=draws)) for images, draws in parts]


def backward(
    encoder: nn.Module, objective: nn.Module, images: Sequence[Tensor], batch: Batch, step: Step, *, keys: nn.Module | None
) -> tuple[Tensor, Stats]:
    """Set the gradients of the global mean loss, alike on every rank; returns the loss and its statistics.

    `images`: what `prepared` gave; `encoder` is no DDP; `keys` is the momentum encoder. Collective: every rank calls it.
    """
    rows, parts = _Rows.of(batch, len(images)), members_of(encoder, images, batch)
    with torch.no_grad():
        vectors = _encoded(encoder, parts, step, rows.first_piece)
        others = None if keys is None else rows.gather(with_frozen(_encoded(keys, parts, step, rows.first_piece), batch))
    vectors.requires_grad_()
    with_given = with_frozen(vectors, batch)
    everyone = rows.gather(with_given.detach()).requires_grad_()  # [G, D]
    about: dict[str, Any] = {**rows.ids(batch), "keys": others, "step": step.number, "with_stats": step.with_stats}
    with ranges.part(ranges.LOSS), collectives.alone():
        loss, stats = objective(everyone, **about)
        loss.backward()
    assert everyone.grad is not None
    (grad,) = torch.autograd.grad(with_given, vectors, everyone.grad[rows.own])
    _add_up(encoder, parts, grad, step, rows.first_piece)
    return loss.detach(), stats


def hash_of(modules: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The first 16 digits of the sha256 over all tensors of some modules' states, in the order of their names."""
    digest = hashlib.sha256()
    named = {f"{name}.{key}": tensor for name, state in modules.items() for key, tensor in state.items()}
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def refuse_unequal(value: str, step: int, device: torch.device) -> None:
    """Raise Unrecoverable when ranks hold different weights. Collective: every rank calls it with its `hash_of`."""
    mine = torch.tensor([[int(value[i : i + 4], 16) for i in range(0, 16, 4)]], device=device)
    every = collectives.gather(mine, [1] * collectives.world())
    different = (every != every[0]).any(1).nonzero()[:, 0].tolist()
    if different:
        raise Unrecoverable(
            f"step {step}: with train.reproducible all workers hold the same weights, but worker {different[0]} differs from "
            "worker 0; use machines of one kind, with the same libraries"
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where this rank's rows, records and pieces stand among those of all ranks."""

    num_rows: list[int]
    num_records: list[int]
    first_piece: int

    @staticmethod
    def of(batch: Batch, num_pieces: int) -> _Rows:
        mine = torch.tensor([[batch.num_rows, batch.num_records, num_pieces]], device=batch.group.device)
        every = collectives.gather(mine, [1] * collectives.world()).tolist()
        before = every[: collectives.rank()]
        return _Rows([e[0] for e in every], [e[1] for e in every], sum(e[2] for e in before))

    @property
    def own(self) -> slice:
        first = sum(self.num_rows[: collectives.rank()])
        return slice(first, first + self.num_rows[collectives.rank()])

    def gather(self, rows: Tensor) -> Tensor:
        return collectives.gather(rows, self.num_rows)

    def ids(self, batch: Batch) -> dict[str, Tensor | None]:
        """What the objective wants to know of the rows of all ranks."""
        record = batch.record + sum(self.num_records[: collectives.rank()])
        columns = torch.stack([batch.group, batch.uid, batch.view, record, batch.valid.long()], 1)
        group, uid, view, record, valid = self.gather(columns).unbind(1)
        match = None if batch.match is None else collectives.gather(batch.match, self.num_records)
        target = None if batch.target is None else self.gather(batch.target)
        found = {"group": group, "uid": uid, "view": view, "record": record, "valid": valid == 1}
        return {**found, "match": match, "target": target}


def _encoded(encoder: nn.Module, parts: Sequence[Members], step: Step, first: int) -> Tensor:
    """Vectors [k, D] of this rank's pieces, the first of which is number `first` of all."""
    return joined([_encode(encoder, part, step, first + i) for i, part in enumerate(parts)], parts)


def _encode(encoder: nn.Module, part: Members, step: Step, piece: int) -> Tensor:
    key = hashlib.blake2b(f"{step.seed} {step.number} {piece}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(key, "little"))
    cast: AbstractContextManager[object] = nullcontext()
    if step.autocast is not None:
        cast = torch.autocast(part.images.device.type, dtype=step.autocast)
    with ranges.part(ranges.FORWARD), cast:
        return encode_members(encoder, part).float()


def _add_up(encoder: nn.Module, parts: Sequence[Members], grad: Tensor, step: Step, first: int) -> None:
    """Set the encoder's gradients to the sums over the pieces of all ranks, from that of this rank's vectors [k, D]."""
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    if not parameters:
        return
    sums: dict[nn.Parameter, Tensor] = {}
    for i, (part, by_vectors) in enumerate(zip(parts, cut(grad, parts), strict=True)):
        again = _encode(encoder, part, step, first + i)
        with ranges.part(ranges.BACKWARD):
            again.backward(by_vectors.clone())  # type: ignore[no-untyped-call]
        for p in parameters:
            if p.grad is not None:
                sums[p] = sums[p].add_(p.grad) if p in sums else p.grad.double()
                p.grad = None
    learning = [p for p in parameters if p in sums]
    flat = torch.cat([sums[p].flatten() for p in learning])
    sums.clear()  # twice the size of the gradients
    summed = collectives.total(flat)
    for p, total in zip(learning, torch.split(summed, [p.numel() for p in learning]), strict=True):
        p.grad = torch.empty_like(p).copy_(total.view_as(p))  # rounded once, and laid out as fused optimizers expect
