"""What a rank knows of its place: in this process, in a local process group, or in a Ray Train worker."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path

import torch

from trainer import collectives


def never() -> bool:
    """What happens nowhere but where a context says otherwise."""
    return False


@dataclass(frozen=True, slots=True)
class RankContext:
    """One rank of `world`; `local_rank` numbers the ranks of a machine."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    node: str = field(default_factory=platform.node)  # a name of its machine
    terminated: Callable[[], bool] = never  # this process was told to end (SIGTERM)
    preempted: Callable[[], bool] = never  # a node of the run is about to go. Collective: every rank calls it


def single(*, gpu: bool) -> RankContext:
    """The only rank, in this process, without a process group."""
    return RankContext(0, 1, 0, device_of(0, gpu=gpu))


def spawned(rank: int, world: int, store: Path, *, gpu: bool, timeout_s: float) -> RankContext:
    """A rank of a local process group that meets at the file `store`."""
    _end_with_driver()
    os.dup2(2, 1)  # stdout is the driver's: what a library prints there must not get into a result
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    device = device_of(rank, gpu=gpu)
    collectives.join(rank, world, store, device=device, timeout_s=timeout_s)
    return RankContext(rank, world, rank, device, terminated=lambda: bool(heard))


def _end_with_driver() -> None:
    """Have the kernel kill this process when its driver dies: a rank that lived on would write into what a new one resumes.

    torch asks for SIGINT, which whoever was started in the background of a shell ignores.
    """
    if sys.platform != "linux":
        return
    from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    driver = parent_process()
    if driver is not None and os.getppid() != driver.pid:  # it died before the kernel was asked
        os._exit(1)


def finish() -> None:
    """End a rank that has done its work, at once: while the interpreter ends, threads inside torch can abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def ray_worker(*, gpu: bool) -> RankContext:
    """A Ray Train worker, whose process group Ray has made."""
    from ray import train
    from ray.util import get_node_ip_address

    context = train.get_context()
    local_rank = context.get_local_rank()
    return RankContext(
        context.get_world_rank(),
        context.get_world_size(),
        local_rank,
        device_of(0, gpu=gpu),
        node=f"{platform.node()} ({get_node_ip_address()})",
        preempted=lambda: train.get_preemption_info() is not None,
    )


def device_of(index: int, *, gpu: bool) -> torch.device:
    """GPU `index` among those this process sees, or the CPU.

    Raises RuntimeError when a GPU is asked for and none can be used.
    """
    if not gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("cluster.gpus_per_worker is above 0, but torch sees no GPU here; set it to 0 or use another machine")
    device = torch.device("cuda", index % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def share_cores(world: int) -> None:
    """Give torch in this process its share of the cores of the machine; OMP_NUM_THREADS goes before."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))


def refuse_few_gpus(workers: int) -> None:
    """Raise RuntimeError unless each of `workers` ranks of this machine can have a GPU of its own, as NCCL wants it."""
    device_of(0, gpu=True)
    have = torch.cuda.device_count()
    if workers > have:
        raise RuntimeError(
            f"cluster.workers {workers}: each needs a GPU of its own, and torch sees {have} here; set cluster.workers={have}"
        )
