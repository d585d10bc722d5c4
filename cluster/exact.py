"""Proof for one config: two ranks give the value and the gradients of one process."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster import context
from cluster.building import augmented, build_training
from configs.schema import Data, RunConfig
from pipelines.mixture import open_sources, parts_of
from pipelines.stream import Loader, units_per_epoch
from trainer import collectives
from trainer.backward import backward, encode, pieces_of

WORLD, MOST_RECORDS, TOLERANCE = 2, 32, 1e-6
TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of one quantity: |b - a| / |a| and the cosine of a and b, a from one process, b from the ranks; the worst rank."""

    relative_error: float
    cosine: float


@dataclass(frozen=True, slots=True)
class Exactness:
    """How well the ranks agree with one process, in float64, on `records` records."""

    loss: str
    records: int
    value: float
    agreements: dict[str, Agreement]  # value, encoder gradient, loss gradient (when the loss has parameters)

    @property
    def exact(self) -> bool:
        """Whether no relative error is above TOLERANCE; one that is not a number is."""
        return all(a.relative_error <= TOLERANCE for a in self.agreements.values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "exact": self.exact, "tolerance": TOLERANCE, "ranks": WORLD}


@dataclass(frozen=True, slots=True)
class _Found:
    """What a process computed."""

    value: Tensor  # scalar
    encoder: Tensor  # [parameters] gradient
    loss: Tensor  # [parameters] gradient
    has_terms: bool
    records: int


def measure(config: RunConfig) -> Exactness:
    """Encoder, loss and miner of `config` on two gloo ranks against one process: one training batch, float64, CPU.

    The encoder is as initialised and in eval mode (dropout would draw other numbers in every process). The batch is the
    run's first one, cut to at most 32 records, and the ranks' shares are uneven.
    Raises ValueError when the batch makes no term of the loss, RuntimeError when a rank fails.
    """
    config = config.model_copy(update={"data": _small(config)})
    alone = _compute(config, 0, 1)
    name = " + ".join(part.name for part in config.loss)
    if not alone.has_terms:
        raise ValueError(
            f"loss {name} has no term in {alone.records} records, so there is nothing to compare; "
            "set data.per_class so that a batch holds several images of a class"
        )
    ranks = _spawn(config)
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {
        "value": [(alone.value, rank.value) for rank in ranks],
        "encoder gradient": [(alone.encoder, rank.encoder) for rank in ranks],
        "loss gradient": [(alone.loss, rank.loss) for rank in ranks] if len(alone.loss) else [],
    }
    agreements = {name: _worst([_compare(*pair) for pair in found]) for name, found in pairs.items() if found}
    return Exactness(name, alone.records, float(alone.value), agreements)


def describe(found: Exactness) -> str:
    """The measurement for a person."""
    lines = [
        f"{found.loss} on {WORLD} ranks against one process: {found.records} records, float64, loss {found.value:.6g}",
        f"{'':20}{'relative error':>16}{'cosine':>20}",
        *(f"{name:20}{a.relative_error:16.1e}{a.cosine:20.15f}" for name, a in found.agreements.items()),
        f"exact: no relative error is above {TOLERANCE:.0e}"
        if found.exact
        else f"NOT exact: a relative error is above {TOLERANCE:.0e}; a loss returns sum and count over its rows, never a mean",
    ]
    return "\n".join(lines)


def _small(config: RunConfig) -> Data:
    """`config.data` with a small batch of an odd number of units, so that two ranks get uneven shares."""
    data, manifest = config.data, open_sources(config.data.train, config.data.cache)
    per_class = data.per_class
    longest = [int(part.runs.length.max()) for part in parts_of(manifest)] if manifest.kind == "labelled" else [0]
    if per_class is None and min(longest) >= WORLD:
        per_class = WORLD  # so few labelled images hardly ever share a class by chance
    per_unit = per_class or 1
    wanted = min(data.batch, MOST_RECORDS) // per_unit
    wanted = min(wanted, units_per_epoch(manifest, data.model_copy(update={"batch": WORLD * per_unit, "per_class": per_class})))
    units = wanted - 1 if wanted % 2 == 0 and wanted > WORLD else max(wanted, WORLD)
    return data.model_copy(update={"batch": units * per_unit, "per_class": per_class})


def _compute(config: RunConfig, rank: int, world: int) -> _Found:
    """Value and gradients on this process's share of the first batch, through the very parts that training uses."""
    torch.manual_seed(config.seed)
    manifest = open_sources(config.data.train, config.data.cache)
    training = build_training(config, manifest, torch.device("cpu"), torch.float64)
    encoder, objective = training.encoder.eval(), training.objective
    with Loader(manifest, config.data, seed=config.seed, rank=rank, world=world) as stream:
        batch = next(stream)
    images = augmented(config, torch.float64)(batch)
    pieces = pieces_of(batch, config.train.micro_batch)
    keys = None if training.keys is None else encode(training.keys.module.eval(), images, pieces, None, batch)
    extra: dict[str, Any] = {} if keys is None else {"keys": keys}
    value, stats = backward(collectives.data_parallel(encoder), objective, images, batch, pieces=pieces, **extra)
    counts = [float(number) for name, number in stats.items() if name.endswith("num_terms")]
    has_terms = any(counts) or not counts
    return _Found(value, _gradient(encoder), _gradient(objective), has_terms, batch.num_records)


def _gradient(module: nn.Module) -> Tensor:
    """Of all parameters that learn, in one piece; 0 where there is none."""
    grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters() if p.requires_grad]
    return torch.cat(grads).double() if grads else torch.zeros(0, dtype=torch.float64)


def _spawn(config: RunConfig) -> list[_Found]:
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

    with tempfile.TemporaryDirectory(prefix="nearfar-") as folder:
        try:
            spawn(_rank, (Path(folder), config), nprocs=WORLD, join=True)  # type: ignore[no-untyped-call]
        except (ProcessRaisedException, ProcessExitedException) as error:
            last = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
            raise RuntimeError(f"one process is fine, but of {WORLD} ranks one failed: {last}") from error
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _rank(rank: int, folder: Path, config: RunConfig) -> None:
    torch.set_num_threads(1)
    context.spawned(rank, WORLD, folder / "store", gpu=False, timeout_s=config.cluster.timeout_s)
    try:
        torch.save(_compute(config, rank, WORLD), folder / f"{rank}.pt")
    finally:
        collectives.leave()
    context.finish()


def _compare(expected: Tensor, found: Tensor) -> Agreement:
    if found.shape != expected.shape:
        return Agreement(float("nan"), float("nan"))
    error = (found - expected).norm() / expected.norm().clamp_min(TINY)
    lengths = found.norm() * expected.norm()
    cosine = (found.flatten() @ expected.flatten() / lengths) if lengths > 0 else (found == expected).all().double()
    return Agreement(float(error), float(cosine))


def _worst(found: list[Agreement]) -> Agreement:
    """The largest error; one that is not a number counts most."""
    return max(found, key=lambda a: float("inf") if a.relative_error != a.relative_error else a.relative_error)
