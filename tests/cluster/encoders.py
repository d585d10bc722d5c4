"""Small encoders, exported, and many small images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import simplejpeg
import torch

from configs.schema import RunConfig
from pipelines.pack import pack
from trainer.encoders import build_encoder
from trainer.export import export_encoder

SIDE, DIM = 16, 8
SMALL = {"name": "convnet", "dim": DIM, "patch": 2, "widths": [8], "blocks": 1, "grid": 2}


def export_small(folder: Path, seed: int = 0, *, side: int = SIDE, encoder: dict[str, Any] = SMALL) -> Path:
    """An untrained convnet, as `nearfar train` leaves it in RUN/export."""
    about = {"name": "x", "data": {"train": "x", "image_size": side}, "encoder": encoder, "loss": {"name": "sup_con"}}
    config = RunConfig.model_validate({**about, "optim": {"lr": 1e-3}, "train": {"steps": 1}})
    torch.manual_seed(seed)
    built = build_encoder(config.encoder, side).eval()
    export_encoder(built, folder, image_size=side, resize="crop", card={})
    return folder


def pack_many(folder: Path, count: int, *, side: int) -> Path:
    """So many different JPEGs of `side` pixels, a multiple of 8, four a class, in shards."""
    blocks = np.random.default_rng(0).integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
    files = [simplejpeg.encode_jpeg(block.repeat(8, axis=0).repeat(8, axis=1), quality=85) for block in blocks]
    labels = [f"c{number // 4}" for number in range(count)]
    pyarrow.parquet.write_table(pa.table({"image": files, "label": labels}), folder / "table.parquet", row_group_size=5000)
    pack(folder / "table.parquet", folder / "shards", max_shard_records=9999)
    return folder / "shards"
