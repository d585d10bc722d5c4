"""Sets of vectors to measure: random ones, with ties, duplicates and classes of one; and real ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from configs.schema import Encoder
from trainer.encoders import build_encoder

NUM_RANDOM = 20


@dataclass(frozen=True, slots=True)
class Set:
    """Vectors [N, D] in float64 with their groups [N]."""

    vectors: Tensor
    group: Tensor


def random_set(seed: int) -> Set:
    """Every other one has ties and duplicates; most have classes of one; the groups are large, scattered numbers."""
    random = np.random.default_rng(seed)
    n, d = int(random.integers(20, 300)), int(random.integers(2, 17))
    group = np.minimum(random.geometric(0.1, n), random.integers(3, n))  # some classes are large, many are small
    if seed % 2:
        vectors = random.integers(-1, 2, (n, d)).astype(np.float64) / 2  # whose products are exact
    else:
        centre = random.standard_normal((int(group.max()) + 1, d))
        vectors = F.normalize(torch.from_numpy(centre[group] + 2 * random.standard_normal((n, d)))).numpy()
    return Set(torch.from_numpy(vectors), torch.from_numpy(group * 10**15))


def digits() -> Set:
    """Pixels of handwritten digits, about 90 a class."""
    return _digits(lambda label: label)


def big_classes() -> Set:
    """The same in two classes, which are deeper than any list of neighbours that one would print."""
    return _digits(lambda label: label // 5)


def _digits(kind: object) -> Set:
    found = load_digits()
    pixels, label = found.data[::2], kind(found.target[::2])  # type: ignore[operator]
    return Set(F.normalize(torch.from_numpy(pixels)), torch.from_numpy(label))


def drawn() -> Set:
    """Digits seen by a network that has learned nothing: nearly all of one cosine."""
    found = load_digits()
    torch.manual_seed(0)
    encoder = build_encoder(Encoder.model_validate({"name": "convnet", "dim": 32, "patch": 2, "widths": [16], "blocks": 1}), 8)
    images = torch.from_numpy(found.images[:600]).float().div(16)[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        return Set(encoder.eval()(images).double().clone(), torch.from_numpy(found.target[:600]))


REAL = {"digits": digits, "big classes": big_classes, "an untrained network": drawn}
