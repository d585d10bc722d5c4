"""Pluggable parts by name: `{name, **options}` becomes a call of the function that the name stands for."""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from configs.schema import Part

PARTS: dict[str, dict[str, str]] = {
    "encoder": {
        "convnet": "trainer.encoders.convnet:ConvNet",
        "timm": "trainer.encoders.timm:Timm",
        "transformers": "trainer.encoders.transformers:Transformers",
    },
    "loss": {
        "arcface": "trainer.losses.arcface:ArcFace",
        "circle": "trainer.losses.circle:Circle",
        "contrastive": "trainer.losses.contrastive:Contrastive",
        "cosine_embedding": "trainer.losses.cosine_embedding:CosineEmbedding",
        "distill": "trainer.losses.distill:distill",
        "info_nce": "trainer.losses.info_nce:InfoNCE",
        "lifted_structure": "trainer.losses.lifted_structure:LiftedStructure",
        "margin": "trainer.losses.margin:Margin",
        "margin_ranking": "trainer.losses.margin_ranking:MarginRanking",
        "max_margin": "trainer.losses.max_margin:MaxMargin",
        "multi_similarity": "trainer.losses.multi_similarity:MultiSimilarity",
        "proxy_anchor": "trainer.losses.proxy_anchor:ProxyAnchor",
        "recall_at_k": "trainer.losses.recall_at_k:RecallAtK",
        "regress": "trainer.losses.regress:Regress",
        "sigmoid": "trainer.losses.sigmoid:Sigmoid",
        "softmax": "trainer.losses.softmax_head:SoftmaxHead",
        "sup_con": "trainer.losses.sup_con:SupCon",
        "triplet": "trainer.losses.triplet:triplet",
    },
    "optim": {
        "adamw": "trainer.optimizers:adamw",
        "lars": "trainer.optimizers:lars",
        "lion": "trainer.optimizers:lion",
        "sgd": "trainer.optimizers:sgd",
    },
    "dataset": {
        "emoji": "pipelines.sources.emoji:fetch",
        "digits": "pipelines.sources.digits:fetch",
        "fashion-mnist": "pipelines.sources.fashion_mnist:fetch",
    },
}


def resolve(kind: str, name: str) -> Callable[..., Any]:
    """The function behind `name`; `package.module:function` names one's own.

    Raises ValueError for an unknown name, with the nearest known one.
    """
    target = PARTS[kind].get(name, name)
    if ":" not in target:
        raise ValueError(f"unknown {kind} {name!r}; {suggest(name, PARTS[kind])}")
    module, _, attribute = target.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} {name!r} cannot be loaded: {error}") from error
    return found


def build(kind: str, part: Part, **context: Any) -> Any:
    """Call the part with its checked options; `context` is what the caller adds, and no user may set it."""
    function = resolve(kind, part.name)
    return function(**checked_options(kind, part, function, context), **context)


def checked_options(
    kind: str, part: Part, function: Callable[..., Any], context: Iterable[str], also: Iterable[str] = ()
) -> dict[str, Any]:
    """`part.options` converted to the types in the function's signature.

    Names in `also` belong to somebody else and are left out. Raises ValueError naming the key.
    """
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    known = [name for name in signature.parameters if name not in context]
    options = {}
    for key, value in part.options.items():
        if key in also:
            continue
        if key not in known:
            raise ValueError(f"{kind}.{key}: {kind} {part.name!r} has no such option; {suggest(key, [*known, *also])}")
        try:
            options[key] = TypeAdapter(hints.get(key, Any)).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{kind}.{key}: {error.errors()[0]['msg']}, got {value!r}") from error
    for key in known:
        if key not in options and signature.parameters[key].default is inspect.Parameter.empty:
            raise ValueError(f"{kind}.{key}: {kind} {part.name!r} needs this option")
    return options


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
