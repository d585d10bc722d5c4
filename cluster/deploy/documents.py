"""YAML documents with reasons: PyYAML writes the values, and above a value that has one stands its reason as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

WIDTH = 120
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it


@dataclass(frozen=True, slots=True)
class Why:
    """A value, and why it is so."""

    value: Any
    reason: str


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a reader should not have to look anchors up


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def dump(documents: Sequence[Mapping[str, Any]]) -> str:
    """The documents in this order, keys in theirs; a Why may stand for any value of a mapping."""
    return "---\n".join(_dump(document) for document in documents)


def _dump(document: Mapping[str, Any]) -> str:
    text = yaml.dump(plain(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)
    lines = text.splitlines()
    reasons = list(_reasons(document, yaml.compose(text, Loader=_LOADER)))
    for number, reason in sorted(reasons, reverse=True):  # from the end, so that numbers stay right
        indent = " " * (len(lines[number]) - len(lines[number].lstrip()))
        lines[number:number] = [f"{indent}# {part}" for part in textwrap.wrap(reason, WIDTH - len(indent) - 2)]
    return "\n".join(lines) + "\n"


def plain(tree: Any) -> Any:
    """The values alone."""
    if isinstance(tree, Why):
        return plain(tree.value)
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def _reasons(tree: Any, node: Any) -> Iterator[tuple[int, str]]:
    """(line of the key, reason) of every Why; `node` is the same tree as PyYAML found it in the text."""
    tree = tree.value if isinstance(tree, Why) else tree
    if isinstance(tree, Mapping):
        for (_, value), (key_node, value_node) in zip(tree.items(), node.value, strict=True):
            if isinstance(value, Why):
                yield key_node.start_mark.line, value.reason
            yield from _reasons(value, value_node)
    elif isinstance(tree, (list, tuple)):
        for value, value_node in zip(tree, node.value, strict=True):
            yield from _reasons(value, value_node)
