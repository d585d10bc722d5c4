"""The only user of torch.distributed: with one process every function here is the identity."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import ranges

T = TypeVar("T")
_alone = False


def join(rank: int, world: int, store: Path, *, device: torch.device, timeout_s: float) -> None:
    """Make the process group of `world` local ranks, which meet at the file `store`."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)


def leave() -> None:
    """End the process group; ranks that still wait in a collective get an error at once."""
    if _on():
        dist.destroy_process_group()


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if _on() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if _on() else 0


def sizes(num_rows: int, device: torch.device) -> list[int]:
    """How many rows every rank holds, in rank order. Collective: every rank calls it."""
    if world() == 1:
        return [num_rows]
    mine = torch.tensor([num_rows], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(world())]
    with ranges.part(ranges.GATHER):
        dist.all_gather(every, mine)
        return [int(n) for n in torch.cat(every).tolist()]


def gather(rows: Tensor, num_rows: Sequence[int]) -> Tensor:
    """Concatenate `rows` [n, ...] of every rank in rank order; no gradient. Collective: every rank calls it.

    `num_rows` is what `sizes` gave; shorter ranks are padded on the wire.
    """
    if world() == 1:
        return rows
    longest = max(num_rows)
    parts = [rows.new_empty((longest, *rows.shape[1:])) for _ in num_rows]
    with ranges.part(ranges.GATHER):
        dist.all_gather(parts, _padded(rows.contiguous(), longest))
    return torch.cat([part[:n] for part, n in zip(parts, num_rows, strict=True)])


def scatter_sum(rows: Tensor, num_rows: Sequence[int]) -> Tensor:
    """The reverse of `gather`: sum `rows` [G, ...] over ranks, keep the own slice. Collective: every rank calls it."""
    if world() == 1:
        return rows
    longest = max(num_rows)
    parts = [_padded(part, longest).contiguous() for part in torch.split(rows, list(num_rows))]
    mine = torch.empty_like(parts[0])
    with ranges.part(ranges.REDUCE):
        dist.reduce_scatter(mine, parts, op=dist.ReduceOp.SUM)
    return mine[: num_rows[rank()]]


def total(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, as a new tensor. Collective: every rank calls it."""
    return _reduced(x, dist.ReduceOp.SUM)


def largest(x: Tensor) -> Tensor:
    """Elementwise maximum of `x` over all ranks, as a new tensor. Collective: every rank calls it."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    if world() == 1:
        return x
    found = x.clone()
    with ranges.part(ranges.REDUCE):
        dist.all_reduce(found, op=how)
    return found


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite `tensors` with those of rank 0. Collective: every rank calls it."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def from_first(value: Callable[[], T]) -> T:
    """What rank 0's call of `value` returned (a plain Python object), on every rank. Collective: every rank calls it.

    An exception on rank 0 is raised on every rank, so that none waits for a rank that is gone.
    """
    if world() == 1:
        return value()
    box: list[object] = [None, None]
    if rank() == 0:
        try:
            box[0] = value()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]  # type: ignore[misc]
    return box[0]  # type: ignore[return-value]


@contextmanager
def alone() -> Iterator[None]:
    """While this lasts the functions here act as with one process: for what every rank computes whole, alike."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _on() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized()


def _padded(rows: Tensor, length: int) -> Tensor:
    if rows.shape[0] == length:
        return rows
    return torch.cat([rows, rows.new_zeros((length - rows.shape[0], *rows.shape[1:]))])


def data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    """`module` with the gradients averaged over all ranks in backward (DDP), starting from rank 0's weights."""
    if world() == 1:
        return module
    device = next(module.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
