"""What accelerators can do, from NVIDIA's data sheets (dense numbers: where a sheet counts sparsity, half of it)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from configs.plain import suggest


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in GB (10^9 bytes: about what torch can use), TFLOP/s, and GB/s that leave it in one direction."""

    name: str
    memory_gb: float
    bf16_tflops: float  # fp16 where there is no bf16
    fp32_tflops: float
    link_gb_s: float  # NVLink, else PCIe; half of what sheets give for both directions


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100", 32, 125, 15.7, 150),  # V100 SXM2 32 GB; 125 is fp16
        Gpu("t4", 16, 65, 8.1, 16),  # 65 is fp16; PCIe 3.0 x16
        Gpu("a100-40", 40, 312, 19.5, 300),
        Gpu("a100-80", 80, 312, 19.5, 300),
        Gpu("l4", 24, 121, 30.3, 32),  # PCIe 4.0 x16
        Gpu("l40s", 48, 362, 91.6, 32),  # PCIe 4.0 x16
        Gpu("h100", 80, 989, 67, 450),  # SXM
        Gpu("h200", 141, 989, 67, 450),  # SXM
        Gpu("b200", 180, 2250, 75, 900),  # HGX B200
    )
}
ALIASES = {"a100": "a100-80"}


def gpu_named(name: str) -> Gpu:
    """A row of the table; `cpu` is a core of this machine, measured. Raises ValueError for an unknown name."""
    if name == "cpu":
        return _core()
    known = GPUS.get(ALIASES.get(name, name))
    if known is None:
        raise ValueError(f"--gpu {name}: not in the table; {suggest(name, [*GPUS, *ALIASES, 'cpu'])}")
    return known


def flops_per_second(gpu: Gpu, precision: str) -> float:
    """The peak. Raises ValueError for fp64, which few of them are made for."""
    if precision == "fp64":
        raise ValueError("train.precision fp64: plans are for fp32, bf16 and fp16; --set train.precision=bf16")
    return 1e12 * (gpu.fp32_tflops if precision == "fp32" else gpu.bf16_tflops)


def _core() -> Gpu:
    """One core of this machine by a product of matrices, and all of its memory; ranks on it meet over loopback."""
    import torch

    from cluster.memory import machine_bytes

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.rand(512, 512)
        best = min(_seconds(lambda: x @ x) for _ in range(8))
    finally:
        torch.set_num_threads(threads)
    peak = 2 * 512**3 / best / 1e12
    return Gpu("cpu", machine_bytes() / 1e9, peak, peak, 2)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-9)
