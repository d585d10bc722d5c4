"""What a config can say: every setting of the schema, every option of every registered part, as they stand in the code."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from configs.registry import PARTS, resolve
from configs.schema import Part, RunConfig, Tower
from trainer.objective import Objective

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """One setting: where it stands, what may stand there, and the part that it belongs to."""

    path: Path
    hint: Any
    part: tuple[str, str] | None = None  # kind and name

    @property
    def is_fixed(self) -> bool:
        """Whether the value is given: a name, or a member of a choice."""
        return get_origin(self.hint) is Literal and len(get_args(self.hint)) == 1

    @property
    def words(self) -> tuple[str, ...]:
        """Any of these names it in a message."""
        last = () if self.path[-1] == "name" else (self.path[-1],)  # too common a word to be one
        own = (".".join(self.path), *last, *(("data.train",) if self.path[:2] == ("data", "train") else ()))
        return own if self.part is None else (*own, f"{self.path[0]}.name", " ".join(self.part))


def all_subjects() -> list[Subject]:
    """Settings, members of their choices, registered parts and their options."""
    settings = list(settings_of(RunConfig))
    parts = [Subject((kind, "name"), Literal[name], (kind, name)) for kind in ("encoder", "loss") for name in PARTS[kind]]
    optimizers = [Subject(("optim", "name"), Literal[name]) for name in PARTS["optim"]]
    choices = [
        Subject(subject.path, Literal[member]) for subject in settings for member in members(subject.hint) if member is not None
    ]
    return [*settings, *choices, *parts, *optimizers, *options_of("encoder"), *options_of("loss")]


def settings_of(model: type[BaseModel], path: Path = ()) -> Iterator[Subject]:
    """The leaves of a section and of the sections in it; a list of sections is met as its first."""
    for name, field in model.model_fields.items():
        here = (*path, field.alias or name)
        sections = [hint for hint in _flat(field.annotation) if isinstance(hint, type) and issubclass(hint, BaseModel)]
        if not sections:
            hint = field.annotation if not field.metadata else typing.Annotated[(field.annotation, *field.metadata)]
            yield Subject(here, hint)
        elif sections[0] not in (Part, Tower):
            yield from settings_of(sections[0], here)


def options_of(kind: str) -> Iterator[Subject]:
    """Own options of all parts of a kind; those that all losses take are met with each of them in turn."""
    shared: list[tuple[str, Any]] = []
    if kind == "loss":
        shared = [*_parameters(Objective), ("matryoshka", list[int]), ("weight", float)]
    for name in PARTS[kind]:
        part = (kind, name)
        yield from (Subject((kind, option), hint, part) for option, hint in _parameters(resolve(kind, name)))
    names = list(PARTS[kind])
    for number, (option, hint) in enumerate(shared):
        yield Subject((kind, option), hint, (kind, names[number % len(names)]))


def members(hint: Any) -> list[Any]:
    """What a Literal allows, wherever it is in a hint."""
    return [member for inner in _flat(hint) if get_origin(inner) is Literal for member in get_args(inner)]


def _parameters(function: Any) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    for name in inspect.signature(function).parameters:
        if name not in ("image_size", "loss"):
            yield name, hints[name]


def _flat(hint: Any) -> Iterator[Any]:
    """A hint and all that it is made of."""
    yield hint
    if get_origin(hint) is not Literal and (get_origin(hint) in (Union, types.UnionType, tuple) or get_args(hint)):
        for inner in get_args(hint):
            yield from _flat(inner)
