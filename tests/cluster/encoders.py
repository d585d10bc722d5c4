"""A small encoder, exported, and folders of images for it."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.schema import RunConfig
from trainer.encoders import build_encoder
from trainer.export import export_encoder

SIDE, DIM = 16, 8


def export_small(folder: Path, seed: int = 0) -> Path:
    """An untrained convnet, as `nearfar train` leaves it in RUN/export."""
    settings = {"name": "convnet", "dim": DIM, "patch": 2, "widths": [8], "blocks": 1, "grid": 2}
    about = {"name": "x", "data": {"train": "x", "image_size": SIDE}, "encoder": settings, "loss": {"name": "sup_con"}}
    config = RunConfig.model_validate({**about, "optim": {"lr": 1e-3}, "train": {"steps": 1}})
    torch.manual_seed(seed)
    encoder = build_encoder(config.encoder, SIDE).eval()
    export_encoder(encoder, folder, image_size=SIDE, resize="crop", card={})
    return folder
