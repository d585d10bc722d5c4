"""What a worker will hold in memory, estimated before it is started."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cluster.memory import machine_bytes
from configs.registry import given
from configs.schema import RunConfig
from pipelines.manifest import Manifest
from trainer.encoders.towers import Towers, takes_vectors

IMAGES = {"pair": 2, "labelled_pair": 2, "triplet": 3}  # of a record
SMALL_IMAGE, SMALL_ENCODER, MOST_TRIED = 256, 2**27, 2**30  # pixels, numbers, bytes: with no more it is just tried out
_MAKERS = frozenset({"empty", "zeros", "ones", "full", "rand", "randn"})


def worker_bytes(config: RunConfig, manifest: Manifest, encoder: nn.Module, objective: nn.Module) -> dict[str, int]:
    """Bytes of one worker, under the settings that decide them.

    Weights, gradients and two moments; what autograd keeps of the largest piece; batches read ahead, and one as floats.
    """
    share = math.ceil(config.data.batch / config.cluster.least_workers)
    piece = min(share, config.train.micro_batch or share)
    images, pixels = IMAGES.get(manifest.kind, config.data.views), 3 * config.data.image_size**2
    size = 8 if config.train.precision == "fp64" else 4
    sums = 16 if config.train.reproducible else 0  # of gradients in float64, before and after the all-reduce
    remembered = min(_remembered(config), _steps(config) * config.data.batch * images)
    return {
        encoder_settings(config): (4 * size + sums) * _numel(encoder.parameters()),
        "loss.name (its parameters)": (4 * size + sums) * _numel(objective.parameters()),
        "data.image_size, data.batch, train.micro_batch (activations)": (
            record_bytes(encoder, config.data.image_size, images) * piece * size // 4
        ),
        "data.image_size, data.batch, data.prefetch (batches read ahead)": (
            share * images * pixels * (config.data.prefetch + 1 + size)
        ),
        "data.decoded_mb": round(config.data.decoded_mb * 2**20),
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
    """Raise ValueError before the weights made within are more than this machine could train. `what`: the settings to blame."""
    have = machine_bytes()
    try:
        with _Allowance(have // 4):  # with gradients and two moments they take four times as much
            yield
    except _TooMuch as error:
        raise ValueError(f"more weights than {have / 1e9:.3g} GB of memory let one train: {what}; lower these") from error


class _TooMuch(Exception):
    """Not a RuntimeError: libraries between here and there turn those into messages of their own."""


class _Allowance(TorchFunctionMode):
    """Adds up the tensors that are made, before they are. (A dispatch mode would import torch's compiler: seconds.)"""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.used = most, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _MAKERS and str(kwargs.get("device")) != "meta":
            shape = kwargs.get("size", args[0] if args and isinstance(args[0], (list, tuple)) else args)
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            self.used += math.prod(int(side) for side in shape if isinstance(side, int)) * dtype.itemsize
            if self.used > self.most:
                raise _TooMuch
        return func(*args, **kwargs)


def encoder_settings(config: RunConfig) -> str:
    """What the encoder, or each tower, was given."""
    return "; ".join(given(key, part) for key, part in config.encoder.parts().items())


def record_bytes(encoder: nn.Module, image_size: int, images: int) -> int:
    """What autograd keeps for a record of so many images; of towers each for its own."""
    if not isinstance(encoder, Towers):
        return saved_bytes(encoder, image_size) * images
    others = 0 if takes_vectors(encoder.positive) else saved_bytes(encoder.positive, image_size) * (images - 1)
    return saved_bytes(encoder.anchor, image_size) + others


def saved_bytes(encoder: nn.Module, image_size: int, *, autocast: torch.dtype | None = None) -> int:
    """What autograd keeps for one image, in bytes, measured on two; of a large encoder by the shapes alone, if it lets us.

    Shapes tell nothing of `autocast`: a large encoder keeps less with it than this says.
    """
    if image_size <= SMALL_IMAGE and _numel(encoder.parameters()) <= SMALL_ENCODER:
        with suppress(_TooMuch), nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
            return _kept(encoder, image_size, "cpu", most=MOST_TRIED)
    try:  # imports torch's compiler, which takes seconds
        return _kept(copy.deepcopy(encoder).to("meta"), image_size, "meta", most=None)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return _kept(encoder, image_size, "cpu", most=None)


def _kept(encoder: nn.Module, image_size: int, device: str, *, most: int | None) -> int:
    """Raises _TooMuch as soon as more than `most` bytes are kept."""
    kept: dict[Any, int] = {}
    own = {p.untyped_storage()._cdata for p in encoder.parameters()}
    alive = []  # so that no storage gets the address of another

    def note(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        if most is not None and sum(kept.values()) > most:
            raise _TooMuch
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoder(torch.zeros(2, 3, image_size, image_size, device=device))
    return sum(kept.values()) // 2


def _numel(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _remembered(config: RunConfig) -> int:
    sizes = [part.options.get("memory", 0) for part in config.loss]
    return sum(size for size in sizes if isinstance(size, int))


def _steps(config: RunConfig) -> int:
    return config.train.steps or 10**9
