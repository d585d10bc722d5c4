"""Whether two models are the same one."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from cluster.models import Model


def weights_digest(model: Model) -> str:
    """A hash of an encoder's weights and preprocessing, whatever its weights are called: a run and its export have the same."""
    tensors = sorted(_hash(tensor) for tensor in model.module.state_dict().values())
    about = f"{model.image_size} {model.resize} {model.dim}"
    return hashlib.sha256(" ".join([about, *tensors]).encode()).hexdigest()


def _hash(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
