"""What to do when memory runs out."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from configs.schema import RunConfig


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU's or the machine's memory is used up."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def machine_bytes() -> int:
    """Memory that this machine has, or this container may use."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = limit.read_text().strip() if limit.exists() else "max"
        most = min(most, int(text)) if text.isdecimal() else most
    return most


def memory_advice(config: RunConfig, error: BaseException) -> str:
    """One message that names the settings which need less."""
    unit, settings = config.data.per_class or 1, config.train
    share = math.ceil(config.data.batch / config.cluster.least_workers)
    at_once = share if settings.micro_batch is None else min(share, settings.micro_batch)
    smaller = max(unit, at_once // 2 // unit * unit)
    advice = f"set train.micro_batch to {smaller} (now {at_once} records at once; the result stays)"
    if at_once <= unit:
        advice = "train.micro_batch is as low as it can be; lower data.image_size or take a smaller encoder"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"out of memory: {advice}, or encoder.checkpointing to true where the encoder has it, and go on with --resume ({first})"
    )
