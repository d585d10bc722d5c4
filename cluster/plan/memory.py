"""What a rank holds on its device, share by share, and which micro-batch makes it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.plan.models import EncoderFacts
from cluster.plan.wire import LossFacts, Share

MOMENTS = {"adamw": 2, "sgd": 1, "lion": 1, "lars": 1}  # numbers that an optimizer holds for a weight
ROW_BYTES = 140  # of a candidate's ids, their sorted copies and its place
LIBRARIES = 1.5e9  # CUDA's context, NCCL's and cuDNN's buffers
FRAGMENTS = 0.05  # of what is allocated, lost between blocks
CHUNK_BYTES = {True: 2**25, False: 2**30}  # trainer.objective's default on a CPU, on an accelerator


@dataclass(frozen=True, slots=True)
class Holding:
    """What decides the memory of a rank besides its share of the batch. `size`: bytes of a number of the weights."""

    encoder: EncoderFacts
    losses: Sequence[LossFacts]
    pixels: int  # 3 * image_size^2
    moments: int
    averages: int  # EMA and momentum encoders
    size: int = 4
    autocast: bool = False
    reproducible: bool = False
    augments: bool = False
    cpu: bool = False
    prefetch: int = 4
    decoded_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a rank at its peak, in shares that add up to `total`; `host`: of the node's memory beside a GPU."""

    weights: float
    activations: float
    loss: float
    images: float
    other: float
    host: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.loss + self.images + self.other


def loss_bytes(loss: LossFacts, rows: int, candidates: int, *, size: int = 4) -> float:
    """Peak of an objective above its input, linear in the candidates [C, D] and this rank's rows [n, D].

    Rows: the candidates' vectors, their gradient in two orders, ids; the rows at unit length and their gradient; a chunk of
    similarities, at most `chunk_bytes`. What is remembered of past steps stays between them.
    """
    if loss.family == "given":
        return 4.0 * rows * loss.dim * size
    if loss.family != "rows":
        return (
            (3.0 * candidates + 2 * rows) * loss.dim * size
            + 3.0 * loss.classes * loss.per_class * loss.dim * size
            + loss.chunk_bytes
        )
    remembered = loss.memory * (loss.dim * size + 48)
    wide = candidates + loss.memory
    chunk = min(loss.chunk_bytes, rows * wide * size * 8)
    return loss.copies * wide * loss.dim * size + 2.0 * rows * loss.dim * size + wide * ROW_BYTES + chunk + remembered


def memory(held: Holding, share: Share, candidates: int, piece: int) -> Memory:
    """`candidates`: rows of all ranks; `piece`: images that are encoded at once."""
    rows = candidates if held.reproducible else share.rows
    encoder, size = held.encoder, held.size
    sums = 16 if held.reproducible else 0  # of gradients in float64, before and after the all-reduce
    weights = encoder.parameters * size * (1 + held.averages) + encoder.learned * (size * (1 + held.moments) + sums)
    weights += encoder.parameters * 2 if held.autocast else 0  # autocast keeps the weights in 16 bits until backward is done
    weights += sum((2 + held.moments) * size * loss.parameters for loss in held.losses)
    losses = [loss_bytes(loss, rows, candidates, size=size) for loss in held.losses]
    remembered = sum(loss.memory * loss.dim * size for loss in held.losses)
    loss = max(losses, default=0.0) + remembered * (len(losses) > 1)
    activations = encoder.kept_bytes * min(piece, share.images)
    once = share.images * held.pixels
    images = once * (1.0 + size)
    in_pieces = piece < share.images or held.reproducible
    if in_pieces:  # the loss's memory is free again when pieces are encoded with their graph
        activations, loss = (activations, 0.0) if activations > loss else (0.0, loss)
    preparing = once * size * (3 if held.augments else 1)  # before the encoder starts
    images += max(0.0, preparing - activations - loss)
    ahead = float(once * (held.prefetch + 1) + held.decoded_bytes)
    other = ahead if held.cpu else LIBRARIES + FRAGMENTS * (weights + activations + loss + images)
    return Memory(weights, activations, loss, images, other, host=ahead)


def largest_piece(held: Holding, share: Share, candidates: int, have: float, *, unit: int, images: int) -> int | None:
    """The most records that can be encoded at once in `have` bytes, a multiple of `unit`; None when not even one can.

    All of the share if that fits, else a power of two times `unit`; a record has so many `images`.
    """
    if memory(held, share, candidates, share.images).total <= have:
        return share.records
    piece = unit
    while 2 * piece < share.records:
        piece *= 2
    while piece >= unit:
        if memory(held, share, candidates, piece * images).total <= have:
            return piece
        piece //= 2
    return None
