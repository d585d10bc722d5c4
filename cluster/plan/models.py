"""Encoders by name, for machines that cannot build them: counted from their published architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from configs.plain import suggest


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """What an encoder costs. FLOPs count a multiplication and an addition as two."""

    name: str
    parameters: int
    learned: int  # parameters that are not frozen
    dim: int
    forward_flops: float  # of one image
    kept_bytes: float  # what autograd keeps of one image until backward
    source: str
    buffer_bytes: int = 0  # DDP sends them at every forward pass
    checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class Vit:
    """Dosovitskiy et al. 2021, table 1: blocks, width and patch; the MLP is 4 times as wide, attention is fused."""

    depth: int
    width: int
    patch: int

    def facts(self, name: str, image_size: int, dim: int | None, *, size: int, checkpointing: bool = False) -> EncoderFacts:
        """`size`: bytes of a number in matrix products, 2 under autocast; norms and the residual stay at 4."""
        d, patches = self.width, (image_size // self.patch) ** 2
        tokens, pixels = patches + 1, 3 * self.patch**2
        parameters = (pixels + 1 + 1 + tokens + 2) * d + self.depth * (12 * d * d + 13 * d)
        macs = self.depth * (12 * tokens * d * d + 2 * tokens * tokens * d) + patches * pixels * d
        # Inputs of two norms; those of four products, queries, keys and values, what attention gives, the MLP's before GELU.
        block = tokens * d * (2 * 4 + (1 + 3 + 1 + 1 + 4 + 4) * size)
        blocks = self.depth * tokens * d * 4 + block if checkpointing else self.depth * block  # else only what goes into each
        kept = blocks + tokens * d * 4 + patches * pixels * size
        return _with_head(name, parameters, macs, kept, d, dim)


@dataclass(frozen=True, slots=True)
class ResNet:
    """He et al. 2016, table 1, bottlenecks; the stride is that of the 3x3 convolution, as in torchvision."""

    blocks: tuple[int, int, int, int]

    def facts(self, name: str, image_size: int, dim: int | None, *, size: int, checkpointing: bool = False) -> EncoderFacts:
        """`checkpointing` is not taken into account: an upper bound."""
        parameters, macs, kept = 0, 0, 0.0
        for into, out, kernel, side, activated in self._convolutions(image_size):
            weights, area = kernel * kernel * into * out, out * side * side
            parameters += weights + 2 * out  # a BatchNorm follows each
            macs += weights * side * side
            kept += area * size * (2 if activated else 1)  # the norm's input; the ReLU's result, the next one's input
        stem = 64 * (image_size // 4) ** 2
        kept += stem * (size + 8) + 3 * image_size**2 * size  # what max pooling gives and its indices; the image
        return _with_head(name, parameters, macs, kept, 2048, dim)

    def _convolutions(self, image_size: int) -> Iterator[tuple[int, int, int, int, bool]]:
        """(channels in, out, kernel, side of the result, whether a ReLU follows)"""
        yield 3, 64, 7, image_size // 2, True
        into, side = 64, image_size // 4
        for stage, count in enumerate(self.blocks):
            width = 64 * 2**stage
            for block in range(count):
                before, side = side, side // 2 if stage and not block else side
                yield into, width, 1, before, True
                yield width, width, 3, side, True
                yield width, 4 * width, 1, side, True
                if not block:
                    yield into, 4 * width, 1, side, False
                into = 4 * width


MODELS: dict[str, Vit | ResNet] = {
    "vit-s16": Vit(12, 384, 16),
    "vit-b32": Vit(12, 768, 32),
    "vit-b16": Vit(12, 768, 16),
    "vit-l16": Vit(24, 1024, 16),
    "vit-l14": Vit(24, 1024, 14),
    "vit-h14": Vit(32, 1280, 14),
    "resnet50": ResNet((3, 4, 6, 3)),
    "resnet101": ResNet((3, 4, 23, 3)),
}


def published(name: str, image_size: int, dim: int | None, precision: str, *, checkpointing: bool = False) -> EncoderFacts:
    """Facts of a model of the table with a linear head of `dim`. Raises ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"--encoder {name}: not in the table; {suggest(name, MODELS)}")
    size = 4 if precision == "fp32" else 2
    facts = MODELS[name].facts(name, image_size, dim, size=size, checkpointing=checkpointing)
    return replace(facts, checkpointing=checkpointing)


def _with_head(name: str, parameters: int, macs: int, kept: float, width: int, dim: int | None) -> EncoderFacts:
    head = 0 if dim is None else width * dim
    parameters, macs = parameters + head, macs + head
    return EncoderFacts(name, parameters, parameters, dim or width, 2.0 * macs, kept, "counted from the published architecture")
