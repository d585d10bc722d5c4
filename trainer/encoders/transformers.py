"""Vision models of the transformers library, from a local folder or from what the hub's cache holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from configs.section import Dim
from trainer.encoders.freeze import freeze_unused
from trainer.encoders.licence import licence_of
from trainer.encoders.pixels import Normalise
from trainer.encoders.stages import stages_around
from trainer.objective import unit


class Transformers(nn.Module):
    """A vision model (ViT, DINOv2, ConvNeXt, the image side of CLIP and SigLIP, ...), a linear head, unit length.

    `path`: a folder as `save_pretrained` writes it, or the name of a model that is in the hub's cache; nothing is fetched.
    `pool`: the first token, the mean of all (maps of features are always averaged), or the model's own `pooler_output`;
    `dim`: of the head, null for none;
    `weights`: false draws them anew; `checkpointing`: blocks are computed again in backward instead of kept.
    Raises ValueError when the library or the model is not there.
    """

    def __init__(
        self,
        image_size: int,
        path: str,
        dim: Dim | None = None,
        pool: Literal["first", "mean", "pooler"] = "first",
        weights: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.pool = image_size, pool
        model, found = _load(path, weights)
        self.model: Any = getattr(model, "vision_model", model)  # of CLIP and its like: the image side
        if checkpointing:
            if not getattr(self.model, "supports_gradient_checkpointing", False):
                raise ValueError(f"encoder.checkpointing: {type(self.model).__name__} cannot do that; set it to false")
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        width = _width(self.model.config, path)
        self.head = nn.Identity() if dim is None else nn.Linear(width, dim, bias=False)
        self.dim = width if dim is None else dim
        mean, std = found.get("image_mean") or [0.5] * 3, found.get("image_std") or [0.5] * 3
        self.pixels = Normalise(mean, std)
        self.stages = stages_around(self.model, "model.")
        tokens = ("cls_token", "mask_token", "position_embeddings", "position_embedding.weight", "class_embedding")
        self.undecayed = [name for name, _ in self.named_parameters() if name.endswith(tokens)]
        self.about = {
            "architecture": type(self.model).__name__,
            "weights": path if weights else "drawn anew",
            "licence of the weights": licence_of(found.get("readme")) if weights else "none",
            "pixels": f"less mean {mean}, over std {std}, both inside the program",
        }
        freeze_unused(self, image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Float images [n, 3, S, S] in [0, 1] to unit vectors [n, dim]."""
        found = self.model(pixel_values=self.pixels(images))
        last = found.last_hidden_state
        if self.pool == "pooler":
            pooled = found.pooler_output.flatten(1)
        elif last.ndim == 4:
            pooled = last.mean((2, 3))  # [n, C, h, w]
        else:
            pooled = last[:, 0] if self.pool == "first" else last.mean(1)  # [n, tokens, C]
        return unit(self.head(pooled))


def _load(path: str, weights: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model in float32, and what its folder says of preprocessing, with its model card as `readme`."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"encoder.name: transformers needs `pip install 'nearfar[transformers]'` ({error})") from error
    try:
        transformers.utils.logging.disable_progress_bar()
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(path, **options)
        if weights:
            model = transformers.AutoModel.from_pretrained(path, config=config, dtype=torch.float32, **options)
        else:
            model = transformers.AutoModel.from_config(config, dtype=torch.float32)
        files = {name: _beside(path, name) for name in ("preprocessor_config.json", "README.md")}
        settings = files["preprocessor_config.json"]
        found: dict[str, Any] = json.loads(settings) if settings is not None else {}
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"encoder.path: {path} cannot be loaded: {' '.join(str(error).split())[:300]}; give a folder that save_pretrained "
            "wrote, or a model in the hub's cache (nothing is fetched while training)"
        ) from error
    return model.train(), {**found, "readme": files["README.md"]}


def _beside(path: str, name: str) -> str | None:
    from transformers.utils import cached_file

    options: dict[str, Any] = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    file = cached_file(path, name, _raise_exceptions_for_connection_errors=False, **options)
    return None if file is None else Path(file).read_text(encoding="utf-8")


def _width(config: Any, path: str) -> int:
    settings: Mapping[str, Any] = config.to_dict()
    sizes = settings.get("hidden_size"), (settings.get("hidden_sizes") or [None])[-1], settings.get("embed_dim")
    width = next((size for size in sizes if isinstance(size, int)), None)
    if width is None:
        raise ValueError(f"encoder.path: {path} is no vision model that tells its width ({settings.get('model_type')})")
    return width
