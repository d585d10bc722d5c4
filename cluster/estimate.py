"""What a worker will hold in memory, estimated before it is started."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.memory import machine_bytes
from configs.registry import given
from configs.schema import RunConfig
from pipelines.manifest import Manifest

IMAGES = {"pair": 2, "labelled_pair": 2, "triplet": 3}  # of a record
_MAKERS = frozenset({"empty", "zeros", "ones", "full", "rand", "randn", "new_empty", "new_zeros", "new_full"})


def worker_bytes(config: RunConfig, manifest: Manifest, encoder: nn.Module, objective: nn.Module) -> dict[str, int]:
    """Bytes of one worker, under the settings that decide them.

    Weights, gradients and two moments; what autograd keeps of the largest piece; batches read ahead, and one as floats.
    """
    share = math.ceil(config.data.batch / config.cluster.least_workers)
    piece = min(share, config.train.micro_batch or share)
    images, pixels = IMAGES.get(manifest.kind, 1), 3 * config.data.image_size**2
    size = 8 if config.train.precision == "fp64" else 4
    sums = 16 if config.train.reproducible else 0  # of gradients in float64, before and after the all-reduce
    remembered = min(_remembered(config), _steps(config) * config.data.batch * images)
    return {
        given("encoder", config.encoder): (4 * size + sums) * _numel(encoder.parameters()),
        "loss.name (its parameters)": (4 * size + sums) * _numel(objective.parameters()),
        "data.image_size, data.batch, train.micro_batch (activations)": (
            _saved_bytes(encoder, config.data.image_size) * piece * images * size // 4
        ),
        "data.image_size, data.batch, data.prefetch (batches read ahead)": (
            share * images * pixels * (config.data.prefetch + 1 + size)
        ),
        "loss.memory": remembered * (int(encoder.dim) * size + 48),  # type: ignore[arg-type]
    }


def refuse_too_much(config: RunConfig, shares: Mapping[str, int]) -> None:
    """Raise ValueError when one worker alone would need more than there is; GPUs of another machine are not judged."""
    have, where = machine_bytes(), "this machine has"
    if config.cluster.gpus_per_worker > 0:
        if not torch.cuda.is_available():
            return
        have, where = torch.cuda.get_device_properties(0).total_memory, "a GPU here has"
    needed = sum(shares.values())
    if needed <= have:
        return
    largest = sorted(shares, key=lambda name: -shares[name])[:2]
    parts = "; ".join(f"{shares[name] / 1e9:.3g} GB for {name}" for name in largest if shares[name] > 0.05 * needed)
    raise ValueError(
        f"a worker would need about {needed / 1e9:.3g} GB of memory, {where} {have / 1e9:.3g} GB: {parts}; lower what is "
        "named, or set train.micro_batch and encoder.checkpointing"
    )


@contextmanager
def allowance(what: str) -> Iterator[None]:
    """Raise ValueError before the tensors made within take more than this machine's memory. `what`: the settings to blame."""
    have = machine_bytes()
    try:
        with _Allowance(have):
            yield
    except _TooMuch as error:
        raise ValueError(
            f"more than the {have / 1e9:.3g} GB of memory that this machine has would be needed for {what}"
        ) from error


class _TooMuch(Exception):
    """Not a RuntimeError: libraries between here and there turn those into messages of their own."""


class _Allowance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the tensors that are made, before they are."""

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most, self.used = most, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _MAKERS and str(kwargs.get("device")) != "meta":
            shape = next((one for one in args if isinstance(one, (list, tuple))), ())
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            self.used += math.prod(int(side) for side in shape) * dtype.itemsize
            if self.used > self.most:
                raise _TooMuch
        return func(*args, **kwargs)


def _saved_bytes(encoder: nn.Module, image_size: int) -> int:
    """What autograd keeps for one image, in bytes, measured on two: by their shapes alone, if the encoder can do that."""
    try:
        return _kept(copy.deepcopy(encoder).to("meta"), image_size, "meta")
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return _kept(encoder, image_size, "cpu")


def _kept(encoder: nn.Module, image_size: int, device: str) -> int:
    kept: dict[Any, int] = {}
    own = {p.untyped_storage()._cdata for p in encoder.parameters()}
    alive = []  # so that no storage gets the address of another

    def note(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = encoder(torch.zeros(2, 3, image_size, image_size, device=device))
    del result
    return sum(kept.values()) // 2


def _numel(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _remembered(config: RunConfig) -> int:
    sizes = [part.options.get("memory", 0) for part in config.loss]
    return sum(size for size in sizes if isinstance(size, int))


def _steps(config: RunConfig) -> int:
    return config.train.steps or 10**9
