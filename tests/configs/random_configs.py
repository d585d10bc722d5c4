"""Random configs, bad ones and good ones that were changed; each is a function of its seed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

import configs
from tests.configs.faults import COMBINATIONS, FILES, TEXTS
from tests.configs.subjects import Subject, all_subjects
from tests.configs.values import bad_value, plausible_value
from tests.conftest import CONFIG

NUM_BAD, NUM_CHANGED = 280, 100  # as many as let every setting, name and option have its turn
NEEDED: dict[str, dict[str, Any]] = {
    "lenet": {"raw": False},  # most losses scale vectors
    "timm": {"model": "nothing"},
    "transformers": {"path": "nothing"},
    "multiscale": {"patch": 2, "widths": [8, 16], "blocks": 1, "grid": 2, "shallow_grid": 2},  # images may be of 16 pixels
}
PAIRED = ("cosine_embedding", "margin_ranking")
GOOD = """
name: small
seed: 3
data:
  {train: "PLACE/KIND/train", eval: "PLACE/KIND/eval", image_size: 24, batch: 32, per_class: 2, augment: {crop: [0.7, 1]}}
encoder: {name: convnet, dim: 16, patch: 2, widths: [8, 16], blocks: 1, grid: 2}
loss: {name: info_nce, temperature: 0.1}
optim: {lr: 1.0e-3}
train: {steps: 20, log_every: 1}
cluster: {workers: 1, storage: "PLACE/runs"}
tracking: {enabled: false}
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A config as it lies on the disk, and what may be named when it is refused: any one of `words`."""

    text: bytes
    words: tuple[str, ...]


def bad_config(seed: int, place: Path) -> Case:
    """A good config with one to three faults. All settings, names and options have their turn within NUM_BAD seeds."""
    random = Random(f"bad {seed}")
    tree = good_config(place)
    turn, place_in_turn = divmod(seed, 10)
    if place_in_turn == 0:
        return Case(FILES[turn % len(FILES)], ("run.yaml",))
    if place_in_turn == 1:
        return Case(TEXTS[turn % len(TEXTS)](_dump(tree)), ("run.yaml",))
    if place_in_turn in (2, 3):
        settings, words = COMBINATIONS[(turn * 2 + place_in_turn - 2) % len(COMBINATIONS)]
        for path, value in settings.items():
            put(tree, tuple(path.split(".")), _filled(value, place))
        return Case(_dump(tree), words)
    if place_in_turn == 4:
        return _without_shape(random, tree)
    deck = _deck()
    first = (turn * 5 + place_in_turn - 5) * 2
    subjects = [deck[first % len(deck)], deck[(first + 1) % len(deck)], random.choice(deck)]
    return _changed(random, tree, subjects[: random.choice([2, 2, 3])], place, share_bad=0.8)


def changed_config(seed: int, place: Path) -> Case:
    """A good config of the tests or a recipe, with one to three settings changed to values that may be right."""
    random = Random(f"changed {seed}")
    base = ["digits", "emoji", "tests", "plain"][seed % 4]
    tree = good_config(place) if base == "plain" else of_tests(place) if base == "tests" else recipe(base, place)
    subjects = random.sample(_deck(), random.randint(1, 3))
    return _changed(random, tree, subjects, place, share_bad=0.3)


def good_config(place: Path, kind: str = "labelled") -> dict[str, Any]:
    """A config that runs, on data of `kind` in `place`."""
    tree: dict[str, Any] = yaml.safe_load(GOOD.replace("PLACE", str(place)).replace("KIND", kind))
    if kind != "labelled":
        del tree["data"]["per_class"]
    return tree


def recipe(name: str, place: Path) -> dict[str, Any]:
    """A shipped recipe on the data in `place`."""
    tree: dict[str, Any] = yaml.safe_load((Path(configs.__file__).parent / "recipes" / f"{name}.yaml").read_text())
    tree["data"] |= {"train": f"{place}/labelled/train", "eval": f"{place}/labelled/eval", "batch": 64, "threads": 1}
    tree["cluster"] = {"workers": 1, "storage": f"{place}/runs"}
    tree["tracking"]["enabled"] = False
    return tree


def of_tests(place: Path) -> dict[str, Any]:
    """The config that other tests train with."""
    tree: dict[str, Any] = yaml.safe_load(CONFIG.format(name="small", shards=place / "labelled", storage=place / "runs"))
    return {**tree, "tracking": {"enabled": False}}


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set what `path` names; in a list of sources or losses, that of the first."""
    *parents, last = path
    for parent in parents:
        tree = _section(tree, parent)
    tree[last] = value


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The section of that name, or the first in a list of them; made when it is not there."""
    inner = tree.get(name)
    if isinstance(inner, str):
        inner = tree[name] = [{"path": inner}]
    if isinstance(inner, list):
        inner = inner[0] if inner and isinstance(inner[0], dict) else None
    if not isinstance(inner, dict):
        inner = tree[name] = {}
    return inner


@cache
def _deck() -> list[Subject]:
    deck = all_subjects()
    Random(0).shuffle(deck)
    return deck


def _changed(random: Random, tree: dict[str, Any], subjects: list[Subject], place: Path, *, share_bad: float) -> Case:
    for subject in subjects:
        if subject.part is not None:
            kind, name = subject.part
            given = name == "triplet" and subject.path[-1] in ("p", "eps", "swap", "half")
            needed = "labelled_pair" if name in PAIRED else "triplet" if given else None
            if needed is not None:
                tree["data"] = {**good_config(place, needed)["data"], "image_size": tree["data"]["image_size"]}
            if name != _section(tree, kind).get("name"):
                tree[kind] = {"name": name, **NEEDED.get(name, {})}
    for subject in subjects:
        bad = random.random() < share_bad and not subject.is_fixed
        value = bad_value(random, subject.hint) if bad else plausible_value(random, subject.hint)
        put(tree, subject.path, _filled(value, place))
    return Case(_dump(tree), tuple(word for subject in subjects for word in subject.words))


def _without_shape(random: Random, tree: dict[str, Any]) -> Case:
    """A section that is missing, is something else, or holds an unknown or misspelt setting."""
    section = random.choice([name for name, value in tree.items() if isinstance(value, dict)])
    key = random.choice(list(tree[section]))
    kind = random.choice(["missing", "required", "other", "unknown", "typo", "moved"])
    if kind == "missing":
        section = random.choice(["name", "data", "train"])
        del tree[section]
        return Case(_dump(tree), (section,))
    if kind == "required":
        section, key = random.choice([("data", "train"), ("train", "steps"), ("encoder", "name")])
        del tree[section][key]
    elif kind == "other":
        tree[section] = random.choice([None, 5, "x", [], [1], [{}], {}, True, [[{"name": "x"}]]])
        return Case(_dump(tree), (section,))
    elif kind == "unknown":
        key = random.choice(["frobnicate", "", "é", "a.b", 5, None, True, 1.5, "x" * 500])
        tree[section][key] = 1
    elif kind == "typo":
        tree[section][key[:-1] + "zz"] = tree[section].pop(key)
    else:
        tree[key] = tree[section].pop(key)
    return Case(_dump(tree), (f"{section}.{key}", str(key), f"{key[:-1]}zz" if kind == "typo" else str(key), section))


def _filled(value: Any, place: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{place}", str(place))
    return copy.deepcopy(value)


def _dump(tree: dict[str, Any]) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, width=10**9).encode()
