"""Real gloo ranks for tests: one process each, results back as picklable values."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` in `world` processes joined by gloo; what each rank returned, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, function, args), nprocs=world, join=True)  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # while the interpreter ends, threads inside torch can abort the process
