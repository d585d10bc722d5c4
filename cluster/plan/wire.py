"""What the ranks of a step send each other: every collective call, its bytes, and how long links take for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

ID_FIELDS = 6  # of trainer.ids.Ids, int64 each
PIECE_FIELDS = 5  # that the reproducible mode gathers
WORD = 8  # bytes of int64 and float64
BUCKET_BYTES = 25 * 2**20  # DDP's default
LINK_SHARE = 0.8  # of a link's nominal bytes/s that large messages reach
HOP_S = 10e-6  # latency of one hop

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast"]


@dataclass(frozen=True, slots=True)
class LossFacts:
    """What decides the traffic and the memory of one objective.

    `family`: rows (compared with everybody's), given (the records' own pairs), centres, softmax (centres with a sum over
    classes), distill. `wire_size`: bytes of a number that is gathered.
    """

    family: Literal["rows", "given", "centres", "softmax", "distill"]
    dim: int
    wire_size: int
    memory: int = 0
    parameters: int = 0  # learned, without sharded ones
    classes: int = 0
    per_class: int = 1
    sharded: bool = False
    target_dim: int = 0  # gathered with the rows
    compared: float = 1.0  # share of rows times candidates
    copies: float = 3.0  # of the candidates' vectors that live at once
    chunk_bytes: int = 2**30


@dataclass(frozen=True, slots=True)
class Share:
    """The largest share of a step that a rank has; all ranks' rows are padded to it on the wire."""

    records: int
    rows: int  # vectors, with those that come from the data
    images: int


@dataclass(frozen=True, slots=True)
class Step:
    """What decides a step's traffic. `size`: bytes of a number of the weights; `keys`: a momentum encoder gives candidates."""

    share: Share
    losses: Sequence[LossFacts]
    learned: int
    size: int = 4
    buffer_bytes: int = 0
    reproducible: bool = False
    keys: bool = False
    match: bool = False  # labelled pairs


@dataclass(frozen=True, slots=True)
class Call:
    """A collective. `nbytes`: what a rank gives to all_gather, gets from reduce_scatter; else the whole tensor."""

    what: str
    kind: Kind
    nbytes: int
    count: int = 1  # messages that it is sent in


@dataclass(frozen=True, slots=True)
class Links:
    """Bytes/s in one direction: between GPUs of a node, and out of a node with all of its cards together."""

    inside: float
    between: float
    gpus_per_node: int


def calls(step: Step) -> list[Call]:
    """Of one step, in the order of sending; none is left out but for those of logged steps (a few hundred bytes)."""
    gradients = step.learned * (WORD if step.reproducible else step.size)
    found = _reproducible(step) if step.reproducible else [call for loss in step.losses for call in _objective(step, loss)]
    if step.buffer_bytes and not step.reproducible:
        found.append(Call("buffers", "broadcast", step.buffer_bytes))  # before the last piece only
    return [*found, Call("gradients", "all_reduce", gradients, max(1, math.ceil(gradients / BUCKET_BYTES)))]


def as_gloo(calls: Sequence[Call], world: int) -> list[Call]:
    """What gloo makes of them on CPUs: its reduce-scatter all-reduces the whole (measured with torch 2.13)."""
    return [
        replace(call, kind="all_reduce", nbytes=world * call.nbytes) if call.kind == "reduce_scatter" else call
        for call in calls
    ]


def sent(call: Call, world: int) -> float:
    """Bytes that a rank of a ring sends: all-reduce 2 (N - 1) / N of the tensor, the others N - 1 of N parts."""
    if call.kind == "all_reduce":
        return 2 * (world - 1) / world * call.nbytes
    if call.kind == "broadcast":
        return call.nbytes * (world - 1) / world  # all but the last hand it on
    return float((world - 1) * call.nbytes)


def seconds(call: Call, world: int, links: Links) -> float:
    """A ring goes through every node once, so that a node sends what a rank sends; sums take a tree's latency."""
    if world == 1:
        return 0.0
    slowest = links.inside if world <= links.gpus_per_node else min(links.inside, links.between)
    ring = call.kind in ("all_gather", "reduce_scatter")
    hops = world - 1 if ring else 2 * math.ceil(math.log2(world))
    return sent(call, world) / (LINK_SHARE * slowest) + call.count * hops * HOP_S


def _objective(step: Step, loss: LossFacts) -> list[Call]:
    rows, vector = step.share.rows, loss.dim * step.size
    found = [Call("numbers", "all_gather", WORD)]
    if loss.family == "rows":
        found.append(Call("vectors", "all_gather", rows * loss.dim * loss.wire_size))
        found.append(Call("ids", "all_gather", rows * ID_FIELDS * WORD))
    if loss.family == "distill":
        found.append(Call("vectors", "all_gather", rows * vector))
        found.append(Call("ids", "all_gather", rows * WORD))
    if loss.family in ("centres", "softmax"):
        found.append(Call("vectors", "all_gather", rows * vector))
        found.append(Call("ids", "all_gather", rows * 2 * WORD))
    if loss.target_dim:
        found.append(Call("targets", "all_gather", rows * loss.target_dim * step.size))
    if loss.family != "given":
        found.append(Call("gradients of vectors", "reduce_scatter", rows * vector))
    own_numbers = 2 + (0 if loss.family in ("centres", "softmax") else loss.parameters)
    return [*found, Call("numbers", "all_reduce", own_numbers * WORD)]


def centre_calls(step: Step, loss: LossFacts, world: int) -> list[Call]:
    """What losses with class centres send besides: gradients of whole centres, and softmax's sums over classes."""
    found = []
    if loss.family in ("centres", "softmax") and not loss.sharded:
        slice_ = math.ceil(loss.classes / world) * loss.per_class
        found.append(Call("gradients of centres", "all_gather", slice_ * loss.dim * step.size))
    if loss.family == "softmax":
        found.append(Call("sums over classes", "all_gather", 2 * world * step.share.rows * step.size))
    return found


def _reproducible(step: Step) -> list[Call]:
    """All rows go to every rank, which computes the losses whole: nothing comes back."""
    rows, dim = step.share.rows, max(loss.dim for loss in step.losses)
    found = [
        Call("numbers", "all_gather", 3 * WORD),
        Call("vectors", "all_gather", rows * dim * step.size * (2 if step.keys else 1)),
        Call("ids", "all_gather", rows * PIECE_FIELDS * WORD),
    ]
    if step.match:
        found.append(Call("ids", "all_gather", step.share.records * WORD))
    target = max(loss.target_dim for loss in step.losses)
    return [*found, *([Call("targets", "all_gather", rows * target * step.size)] if target else [])]
