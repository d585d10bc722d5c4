"""YAML and `--set a.b=c` to a RunConfig, with errors a person can act on."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from configs.plain import DEEPEST, refuse_odd, shorten, suggest
from configs.schema import RunConfig

S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML which refuses a key given twice and reads 1e-3 as a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return dict(super().construct_mapping(node, deep))

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= DEEPEST:  # every further bracket costs more than the one before
            raise yaml.scanner.ScannerError(None, None, "nested too deep", self.get_mark())
        super().fetch_flow_collection_start(token)


def _number(loader: yaml.SafeLoader, node: Any) -> Any:
    text = str(loader.construct_scalar(node))
    try:
        return float(text)
    except ValueError:
        return text


# YAML 1.1 wants a dot in a float, so that "1e-3" would be a string.
_Loader.add_implicit_resolver("!exponent", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))
_Loader.add_constructor("!exponent", _number)

# What PyYAML's own constructors raise for a tag whose value is none of its kind (`!!bool maybe`, `!!timestamp soon`).
_NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError)
RECIPES = Path(__file__).parent / "recipes"
MOST_BYTES = 2**18  # of a file


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, or the recipe of that name, apply `key.path=value` overrides and validate.

    Raises ValueError with one line per mistake; nothing else.
    """
    return parse_config(read_settings(_file_of(path)), overrides, where=str(path))


def parse_config(settings: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "config") -> RunConfig:
    """A RunConfig from a mapping, as `load_config` makes it from a file."""
    tree: dict[str, Any] = dict(settings)
    for override in overrides:
        _set(tree, override)
    return parse_section(RunConfig, tree, where=where)


def parse_section(section: type[S], settings: Mapping[str, Any], *, where: str) -> S:
    """A section from a mapping. Raises ValueError with one line per mistake, under `where`."""
    try:
        refuse_odd(settings)
    except ValueError as error:
        raise ValueError(f"{where}:\n  {error}") from error
    try:
        return section.model_validate(settings)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in dict.fromkeys(_explain(detail) for detail in error.errors()))
        raise ValueError(f"{where}:\n{lines}") from error


def dump_config(config: RunConfig) -> str:
    """The config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as it stands. Raises ValueError for what is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}: more than {MOST_BYTES // 2**10} KiB, which is no config")
    tree = _yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(tree).__name__}")
    return tree


def _file_of(path: str | Path) -> Path:
    """The file, or where there is none, the shipped recipe of that name."""
    recipe = RECIPES / f"{path}.yaml"
    return recipe if not os.path.exists(path) and os.path.dirname(path) == "" and recipe.is_file() else Path(path)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except _NOT_YAML as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{where}: not valid YAML: {reason}") from error


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {override!r}: expected key.path=value, for instance train.steps=100")
    *parents, last = key.strip().split(".")
    place: Any = tree
    for parent in parents:
        index = _index(place, parent, override)
        inner = place[index] if isinstance(place, list) else place.get(index)
        if inner is not None and not isinstance(inner, (dict, list)):
            raise ValueError(f"--set {override!r}: {parent!r} holds {shorten(inner)}, not a section")
        place[index] = list(inner) if isinstance(inner, list) else dict(inner or {})  # a copy: the caller's stays as it was
        place = place[index]
    place[_index(place, last, override)] = _yaml(text, f"--set {override!r}")


def _index(place: Any, key: str, override: str) -> Any:
    """`key` for a section, its number for a list such as that of several losses."""
    if not isinstance(place, list):
        return key
    if not key.isdecimal() or int(key) >= len(place):
        raise ValueError(
            f"--set {override!r}: {key!r} is no number of a list with {len(place)} entries, the first of which is 0"
        )
    return int(key)


def _explain(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"] if not _is_type(part))
    if detail["type"] == "extra_forbidden":
        key = str(detail["loc"][-1])
        elsewhere = [f"{section}.{key}" for section in _fields(()) if key in _fields((section,))]
        return f"{path}: unknown setting; {_did_you_mean(elsewhere) or suggest(key, _fields(detail['loc'][:-1]))}"
    if detail["type"] == "missing":
        return f"{path}: required, and not given"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message}, got {shorten(detail['input'])}"


def _is_type(part: Any) -> bool:
    """Whether a part of pydantic's path is no setting but one of the types that it may have (`constrained-int`)."""
    return isinstance(part, str) and (part in ("int", "str", "float", "bool") or re.search(r"[\[-]", part) is not None)


def _did_you_mean(paths: Sequence[str]) -> str:
    return f"did you mean {' or '.join(paths)}?" if paths else ""


def _fields(path: Sequence[Any]) -> list[str]:
    """The settings of a section, none for a leaf."""
    model: Any = RunConfig
    for part in path:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        sections = [o for o in (annotation, *get_args(annotation)) if isinstance(o, type) and issubclass(o, BaseModel)]
        if not sections:
            return [field.alias or name for name, field in model.model_fields.items()] if annotation is None else []
        model = sections[0]
    return [field.alias or name for name, field in model.model_fields.items()]
