"""Vision models of the timm library, from a local folder or from what the hub's cache holds."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from configs.section import Dim
from trainer.encoders.freeze import freeze_unused
from trainer.encoders.licence import UNKNOWN
from trainer.encoders.pixels import Normalise
from trainer.objective import unit

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class Timm(nn.Module):
    """A timm model without its classifier, a linear head, unit length.

    `model`: a name such as `resnet50.a1_in1k`, whose weights must be in the hub's cache, or a folder with `config.json` and
    `model.safetensors`; nothing is fetched. `dim`: of the head, null for none; `weights`: false draws them anew;
    `checkpointing`: blocks are computed again in backward instead of kept.
    Raises ValueError when the library or the model is not there.
    """

    def __init__(
        self, image_size: int, model: str, dim: Dim | None = None, weights: bool = True, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.image_size, self.checkpointing = image_size, checkpointing
        library, self.model = _load(model, image_size, weights)
        facts = self.model.pretrained_cfg
        width = int(self.model.num_features if not hasattr(self.model, "head_hidden_size") else self.model.head_hidden_size)
        self.head = nn.Identity() if dim is None else nn.Linear(width, dim, bias=False)
        self.dim = width if dim is None else dim
        mean, std = list(facts["mean"]), list(facts["std"])
        self.pixels = Normalise(mean, std)
        found = library.models.group_parameters(self.model, self.model.group_matcher(coarse=False))
        self.stages = [[f"model.{name}" for name in found[i]] for i in sorted(found)]
        self.undecayed = [f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()]
        self.about = {
            "architecture": str(facts.get("architecture") or type(self.model).__name__),
            "weights": model if weights else "drawn anew",
            "licence of the weights": str(facts.get("license") or UNKNOWN) if weights else "none",
            "pixels": f"less mean {mean}, over std {std}, both inside the program",
        }
        freeze_unused(self.train(), image_size)

    def train(self, mode: bool = True) -> Timm:
        """As in every module; checkpointing is for training only."""
        if self.checkpointing:
            self.model.set_grad_checkpointing(mode)
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        """Float images [n, 3, S, S] in [0, 1] to unit vectors [n, dim]."""
        return unit(self.head(self.model(self.pixels(images))))


def _load(model: str, image_size: int, weights: bool) -> tuple[Any, Any]:
    """timm, and the model in training mode."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision raises the second when it was built for another torch
        raise ValueError(f"encoder.name: timm needs `pip install 'nearfar[timm]'` ({error})") from error
    try:
        options: dict[str, Any] = {"pretrained": weights, "num_classes": 0}
        if os.path.isdir(model):
            name = f"local-dir:{model}"
        else:
            name = model
            if weights:
                options["pretrained_cfg_overlay"] = {"file": _cached(timm, model)}
        try:
            return timm, timm.create_model(name, img_size=image_size, **options)
        except TypeError:  # convolutions take any size, and say so in this way
            return timm, timm.create_model(name, **options)
    except (RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"encoder.model: {model} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _cached(timm: Any, model: str) -> str:
    """The file of a model's weights in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    facts = timm.models.get_pretrained_cfg(model)
    if facts is None or not facts.hf_hub_id:
        raise ValueError(f"encoder.model: timm knows no weights for {model!r}; give a folder, or weights: false")
    for name in (facts.hf_hub_filename, *WEIGHT_FILES):
        file = try_to_load_from_cache(facts.hf_hub_id, name) if name else None
        if isinstance(file, str):
            return file
    raise ValueError(
        f"encoder.model: the weights of {model} are not in the hub's cache, and nothing is fetched while training; fetch them "
        f"with `hf download {facts.hf_hub_id}`, or give a folder"
    )
