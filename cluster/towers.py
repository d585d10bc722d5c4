"""Two towers and the data: which members each of them gets, refused before anything starts when it cannot take them."""

from __future__ import annotations

import numpy as np
from torch import nn

from configs.schema import RunConfig
from pipelines.manifest import Manifest
from pipelines.mixture import parts_of
from pipelines.samples import TARGET
from trainer.encoders.towers import Towers, takes_vectors

KINDS = ("pair", "labelled_pair", "triplet")
PROJECTION = "projection"


def with_input_dim(config: RunConfig, manifest: Manifest) -> RunConfig:
    """The config, with the length of the vectors that a projection gets from this data where it is not set."""
    given = config.encoder.parts()
    parts = {
        key: part.model_copy(update={"input_dim": manifest.vector_dim})
        if part.name == PROJECTION and part.options.get("input_dim") is None and manifest.vector_dim
        else part
        for key, part in given.items()
    }
    return config if parts == given else config.model_copy(update={"encoder": config.encoder.replaced(parts)})


def check_kind(config: RunConfig, manifest: Manifest) -> None:
    """Raise ValueError when there are towers, and records without two sides."""
    if config.encoder.towers and manifest.kind not in KINDS:
        raise ValueError(
            f"encoder.positive: data.train holds {manifest.kind} records, all of whose images are anchors; towers are for "
            f"{', '.join(KINDS)} data: pack such, or give one encoder"
        )


def check_members(config: RunConfig, manifest: Manifest, encoder: nn.Module) -> None:
    """Raise ValueError when a tower would get what it cannot encode, from `manifest` or the evaluation sets."""
    if not isinstance(encoder, Towers):
        return
    wants = takes_vectors(encoder.positive)
    sets = {"data.train": manifest}
    for setting, place in (("data.eval", config.data.eval), ("evaluate.gallery", config.evaluate.gallery)):
        if place is not None:
            sets[setting] = Manifest.open(place, cache=config.data.cache)
    for setting, found in sets.items():
        _check_members(setting, found, wants_vectors=wants)
        if wants and found.vector_dim and encoder.positive.input_dim != found.vector_dim:
            raise ValueError(
                f"encoder.positive.input_dim is {encoder.positive.input_dim}, but the vectors of {setting} have "
                f"{found.vector_dim} numbers; leave it out, or pack vectors of one length"
            )


def _check_members(setting: str, manifest: Manifest, *, wants_vectors: bool) -> None:
    if manifest.kind not in KINDS or not (manifest.vector_dim or wants_vectors):  # labelled images are anchors, all of them
        return
    for part in parts_of(manifest):
        for shard in range(len(part.sizes)):
            table = part.table(shard)
            is_vector, view = table.dim > 0, table.view
            if bool((is_vector & (view == 0)).any()):
                raise ValueError(
                    f"encoder.anchor encodes images, but anchors of {setting} are vectors; pack the images as anchors and the "
                    "vectors as positives"
                )
            others = is_vector[(view != TARGET) & (view > 0)]
            if bool(np.any(others != wants_vectors)):
                told = "images" if wants_vectors else "vectors"
                meant = "an image encoder" if wants_vectors else f"name: {PROJECTION}"
                raise ValueError(
                    f"encoder.positive.name: {'vectors' if wants_vectors else 'images'} are what it encodes, but positives or "
                    f"negatives of {setting} are {told}; take {meant}"
                )
