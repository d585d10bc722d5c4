"""The data section: where images come from, how they are changed, and how batches are made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator

from configs.section import Fraction, Place, Positive, Seconds, Section, Sigma


class Augment(Section):
    """Random changes of a training image, each drawn from (seed, epoch, uid, record's row, view)."""

    crop: tuple[Fraction, Fraction] | None = Field(None, description="area range of the random crop, as a share of the image")
    aspect: Annotated[float, Field(ge=1.0, le=4.0)] = Field(4 / 3, description="largest aspect ratio of the crop")
    flip: Fraction = Field(0.0, description="probability of a horizontal flip")
    rotate: Annotated[float, Field(ge=0.0, le=180.0)] = Field(0.0, description="largest rotation, degrees")
    scale: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="zoom by up to 1 +- scale")
    shift: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="largest shift, as a share of the side")
    color: Fraction = Field(0.0, description="strength of brightness, contrast and saturation jitter")
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = Field(0.0, description="largest turn of the hue circle")
    grayscale: Fraction = Field(0.0, description="probability of dropping colour")
    blur: Fraction = Field(0.0, description="probability of a Gaussian blur")
    blur_sigma: tuple[Sigma, Sigma] = Field((0.1, 2.0), description="its range, in pixels of a 224 image; scaled with the size")
    erase: Fraction = Field(0.0, description="probability of erasing a rectangle")

    @field_validator("crop")
    @classmethod
    def _ordered(cls, crop: tuple[float, float] | None) -> tuple[float, float] | None:
        if crop is not None and not 0.0 < crop[0] <= crop[1]:
            raise ValueError(f"crop is [smallest, largest] share of the image's area, both above 0; got {list(crop)}")
        return crop

    @field_validator("blur_sigma")
    @classmethod
    def _widening(cls, sigma: tuple[float, float]) -> tuple[float, float]:
        if sigma[0] > sigma[1]:
            raise ValueError(f"blur_sigma is [smallest, largest]; got {list(sigma)}")
        return sigma


class Source(Section):
    """A data set to train on, and its share where there are several."""

    path: Place
    weight: Positive = Field(1.0, description="share of the records (K-row units) of a batch, relative to the other sources")
    namespace: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")] | None = Field(
        None, description="sources with the same one share classes and groups; without, a source shares them with no other"
    )


class Data(Section):
    """Where images come from and how a batch is made of them."""

    train: Annotated[tuple[Source, ...], Field(min_length=1, max_length=1024)]  # written as one path, or as a list
    eval: Place | None = None
    image_size: Annotated[int, Field(ge=8, le=2048)] = 224
    resize: Literal["crop", "pad", "squash"] = Field(
        "crop", description="to a square: centre crop, white borders, or distortion"
    )
    batch: Annotated[int, Field(ge=2, le=2**24)] = Field(
        256, description="records a step over all workers; images for labelled data"
    )
    per_class: Annotated[int, Field(ge=2, le=2**16)] | None = Field(
        None, description="K of balanced P x K batches, for labelled data"
    )
    views: Literal[1, 2] = Field(
        1,
        description="2: every labelled image twice, each augmented anew; without per_class its label is not used and only the "
        "other view is its positive (self-supervised), with per_class the rest of its class, too",
    )
    tail: Literal["pad", "drop"] = Field("pad", description="a class run's rest below K: masked duplicates, or left out")
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    prefetch: Annotated[int, Field(ge=1, le=64)] = Field(4, description="batches read ahead")
    decoded_mb: Annotated[float, Field(ge=0.0, le=2**20)] = Field(
        256, description="MiB per worker for images of a small data set, kept decoded from one epoch to the next"
    )
    augment: Augment = Augment()
    lanes: Annotated[int, Field(ge=1, le=65536)] = 64
    window: Annotated[int, Field(ge=1, le=2**24)] = Field(
        2048, description="samples (or K-row units) of a lane shuffled together"
    )
    max_bad_fraction: Fraction = Field(0.001, description="unreadable share of the samples seen, above which the run stops")
    max_bad_shard_fraction: Fraction = Field(0.2, description="unreadable share of one shard's images, above which it stops")
    max_pixels: Annotated[int, Field(ge=1, le=2**32)] = Field(
        100_000_000, description="larger images are refused before decoding"
    )
    check_duplicates: Literal["auto"] | bool = Field(
        "auto",
        description="compare train and eval by what images look like before a run; auto: where that takes a few seconds",
    )
    timeout_s: Seconds = Field(120, description="longest time without any image read, and for a remote block with its retries")
    io_threads: Annotated[int, Field(ge=1, le=256)] = Field(8, description="remote blocks fetched at once, per worker")
    block_mb: Annotated[float, Field(gt=0.0, le=1024.0)] = Field(8, description="MiB of a remote shard fetched at once")
    cache: Place | None = Field(
        None,
        description="folder for remote blocks, shared by a node's workers; default: one in the temporary folder",
    )
    cache_gb: Positive = Field(50, description="size of that folder, above which the least recently used blocks are removed")

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_more(cls, train: Any) -> Any:
        several = train if isinstance(train, (list, tuple)) else [train]
        return [{"path": one} if isinstance(one, str) else one for one in several]

    @field_serializer("train")
    def _plainly(self, train: tuple[Source, ...]) -> Any:
        alone = len(train) == 1 and train[0].namespace is None
        return train[0].path if alone else [source.model_dump(mode="json") for source in train]
