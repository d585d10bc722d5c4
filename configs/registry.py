"""Pluggable parts by name: `{name, **options}` becomes a call of the function that the name stands for."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from configs.plain import shorten, suggest
from configs.schema import Part

PARTS: dict[str, dict[str, str]] = {
    "encoder": {
        "convnet": "trainer.encoders.convnet:ConvNet",
        "lenet": "trainer.encoders.lenet:LeNet",
        "multiscale": "trainer.encoders.multiscale:MultiScale",
        "projection": "trainer.encoders.projection:Projection",
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
        raise ValueError(f"{_setting(kind)}unknown {kind} {name!r}; {suggest(name, PARTS[kind])}")
    module, _, attribute = target.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        inspect.signature(found)
    except Exception as error:  # whatever a module of the user's own does when it is imported
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{_setting(kind)}{kind} {name!r} cannot be loaded ({reason}); name a MODULE:FUNCTION") from error
    return found


def build(kind: str, part: Part, returns: type | tuple[type, ...], **context: Any) -> Any:
    """Call the part with its checked options; `context` is what the caller adds, and no user may set it.

    Raises ValueError naming the key, also when what comes back is nothing of the kind `returns`.
    """
    function = resolve(kind, part.name)
    asked = inspect.signature(function).parameters.values()
    missing = sorted(set(context) - {parameter.name for parameter in asked})
    if missing and all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in asked):
        raise ValueError(f"{kind}.name: {part.name!r} takes no {' and no '.join(missing)}, so it is no {kind}")
    made = function(**checked_options(kind, part, function, context), **context)
    require(kind, part, made, returns)
    return made


def require(kind: str, part: Part, made: object, returns: type | tuple[type, ...]) -> None:
    """Raise ValueError when what a part made is nothing of the kind `returns`."""
    if not isinstance(made, returns):
        wanted = " or ".join(one.__name__ for one in (returns if isinstance(returns, tuple) else (returns,)))
        raise ValueError(f"{kind}.name: {part.name!r} makes a {type(made).__name__}, but a {wanted} is needed")


def checked_options(
    kind: str, part: Part, function: Callable[..., Any], context: Iterable[str], also: Iterable[str] = ()
) -> dict[str, Any]:
    """`part.options` converted to the types in the function's signature, whose bounds they must keep.

    Names in `also` belong to somebody else and are left out. Raises ValueError naming the key.
    """
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    known = [name for name in signature.parameters if name not in context]
    options = {}
    for key, value in part.options.items():
        if key in also:
            continue
        if key not in known:
            raise ValueError(f"{kind}.{key}: {kind} {part.name!r} has no such option; {suggest(key, [*known, *also])}")
        options[key] = checked(f"{kind}.{key}", value, hints.get(key, Any))
    for key in known:
        if key not in options and signature.parameters[key].default is inspect.Parameter.empty:
            raise ValueError(f"{kind}.{key}: {kind} {part.name!r} needs this option")
    return options


def checked(key: str, value: Any, hint: Any) -> Any:
    """`value` converted to the type `hint`, which may have bounds; a number is finite. Raises ValueError naming `key`."""
    try:
        return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        details = error.errors()
        messages = dict.fromkeys(str(detail["msg"]).removeprefix("Value error, ") for detail in details)
        raise ValueError(f"{key}: {'; or '.join(messages)}, got {shorten(value)}") from error


def given(kind: str, part: Part) -> str:
    """The options that a part was given, as settings, for a message."""
    return ", ".join(f"{kind}.{key} {shorten(value)}" for key, value in part.options.items()) or f"{kind}.name {part.name!r}"


def _setting(kind: str) -> str:
    """Where the name of a part stands in a config; data sets have no such place."""
    return "" if kind == "dataset" else f"{kind}.name: "
