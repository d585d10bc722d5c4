"""Rows that come as vectors instead of images, e.g. text embeddings: joined with what the encoder made of the rest.

A tower may have made something of these, too: then all that is left is to put them into the batch's order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.batch import Batch


def with_frozen(encoded: Tensor, batch: Batch) -> Tensor:
    """Vectors of all rows, from those of the images, or of images and then vectors.  [k or n, D] -> [n, D], with gradient

    Raises ValueError when the batch's own vectors have another length.
    """
    if batch.vectors is None or batch.place is None:
        return encoded
    place = batch.place.to(encoded.device)
    if encoded.shape[0] == batch.num_rows:
        return encoded.index_select(0, place)
    if batch.vectors.shape[1] != encoded.shape[1]:
        raise ValueError(
            f"encoder.dim is {encoded.shape[1]}, but the vectors of the data have {batch.vectors.shape[1]} numbers; "
            "set encoder.dim to that"
        )
    return torch.cat([encoded, batch.vectors.to(encoded)]).index_select(0, place)
