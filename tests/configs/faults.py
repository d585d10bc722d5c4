"""Faults of a config as a text, whole files that are no config, and settings that do not go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
)

FILES: tuple[bytes, ...] = (
    b"",
    b"[1, 2]",
    b"a: b: c",
    b"name: x\nname: y",
    b"\x00",
    b"? [a]\n: b",
    b"\n\n# nothing\n",
    b"5",
    b"- a\n- b\n",
    b"name\n",
    b"\x00\x01\x02",
    b"\xff\xfe\x00n",
    "name: é".encode("latin-1"),
    b"name: x\n\tdata: 5\n",
    b"name: [1, 2\n",
    b"name: 'x\n",
    b"--- {name: a}\n--- {name: b}\n",
    b"name: !!python/object/apply:os.system ['true']\n",
    b"!!python/object:os.PathLike {}\n",
    b"name: !!bool maybe\n",
    b"seed: !!int ''\n",
    b"seed: !!timestamp soon\n",
    b"data: !!map [1]\n",
    b"data: !!set [1]\n",
    b"data: !!omap 5\n",
    b"data: !!float x\n",
    b"seed: 2024-13-45\n",
    b"seed: " + b"9" * 5000 + b"\n",
    b"name: *nobody\n",
    b"data: &d {train: *d}\n",
    b"<<: 5\n",
    b"? {a: b}\n: c\n",
    b"? !!set {a}\n: c\n",
    b"[" * 5000,
    b"a: " + b"[" * 300 + b"]" * 300 + b"\n",
    b"a: " + b"{b: " * 3000 + b"1" + b"}" * 3000,
    LAUGHS.encode(),
    b"name: x\n" * 2,
    b"%YAML 9.9\n---\nname: x\n",
    b"\xef\xbb\xbfname: x\nname: y\n",
)


def _after(addition: str) -> Callable[[bytes], bytes]:
    return lambda text: text + addition.encode()


TEXTS: tuple[Callable[[bytes], bytes], ...] = (
    _after("seed: 5\n"),
    _after("  stray: 1\n"),
    _after("optim: {lr: 1, lr: 2}\n"),
    _after("extra: !!python/name:os.system\n"),
    _after("extra: !mine 5\n"),
    _after("extra: [\n"),
    lambda text: text.replace(b"seed: 3", b"seed: 0x" + b"f" * 5000),
    _after("\x07\n"),
    _after(LAUGHS.replace("a0:", "loss0:") + "\n"),
    lambda text: text.replace(b"name: small", b"name: sm\xe4ll", 1),
    lambda text: text.replace(b":", b"", 1),
    lambda text: text.replace(b"\n  ", b"\n\t", 1),
    lambda text: b"---\n" + text + b"---\n" + text,
    lambda text: text.decode().encode("utf-16"),
    lambda text: text + b"extra: " + b"[" * 2000 + b"]" * 2000,
)

Settings = dict[str, Any]
COMBINATIONS: tuple[tuple[Settings, tuple[str, ...]], ...] = (
    ({"data.per_class": 3, "data.batch": 32}, ("data.per_class", "data.batch")),
    ({"data.per_class": 32, "data.batch": 32}, ("data.batch", "data.per_class")),
    ({"data.train": "{place}/triplet/train", "data.per_class": 2}, ("data.per_class",)),
    ({"data.train": "{place}/triplet/train", "data.per_class": None, "loss.name": "arcface"}, ("loss",)),
    ({"data.train": "{place}/triplet/train", "data.eval": "{place}/labelled_pair/eval", "data.per_class": 2}, ("per_class",)),
    ({"train.micro_batch": 3}, ("train.micro_batch",)),
    ({"train.reproducible": True}, ("train.micro_batch",)),
    ({"train.reproducible": True, "train.micro_batch": 4, "train.precision": "fp64"}, ("precision",)),
    ({"optim.schedule": "step", "optim.milestones": [30]}, ("optim.milestones",)),
    ({"optim.schedule": "step"}, ("milestones",)),
    ({"optim.milestones": [3, 5]}, ("milestones",)),
    ({"optim.warmup_steps": 20}, ("optim.warmup_steps",)),
    ({"optim.name": "sgd", "optim.betas": [0.9, 0.9]}, ("optim.betas",)),
    ({"optim.name": "sgd", "optim.momentum": 0, "optim.nesterov": True}, ("optim.nesterov",)),
    ({"optim.betas": [0.9, 1.0]}, ("optim.betas",)),
    ({"train.epochs": 2}, ("steps", "epochs")),
    ({"train.precision": "fp16"}, ("precision",)),
    ({"train.early_stop": {"patience": 2}, "data.eval": None}, ("train.early_stop",)),
    ({"tracking.register": "x", "data.eval": None}, ("tracking.register",)),
    ({"encoder.init": "{place}/nothing"}, ("encoder.init",)),
    ({"encoder.init_skip": ["head"]}, ("encoder.init_skip",)),
    ({"encoder.freeze": 99}, ("encoder.freeze",)),
    ({"encoder.widths": [4096] * 4, "encoder.blocks": 50}, ("widths", "encoder")),
    ({"encoder.widths": [2048], "encoder.patch": 1, "data.image_size": 2048}, ("data.image_size", "encoder")),
    ({"data.image_size": 8, "encoder.patch": 4}, ("data.image_size", "encoder.grid", "encoder.patch")),
    ({"cluster.workers": 17}, ("cluster.workers",)),
    ({"cluster.storage": "{place}/file/x"}, ("cluster.storage",)),
    ({"cluster.storage": "/proc/none/x"}, ("cluster.storage",)),
    ({"cluster.checkpoints": "nosuch://x"}, ("cluster.checkpoints",)),
    ({"cluster.checkpoints": "{place}/file"}, ("cluster.checkpoints",)),
    ({"tracking.enabled": True, "tracking.uri": "sqlite:////proc/none/x.db"}, ("tracking.uri",)),
    ({"tracking.enabled": True, "tracking.uri": "sqlite:///{place}/file/x.db"}, ("tracking.uri",)),
    ({"tracking.uri": "gopher://x"}, ("tracking.uri",)),
    ({"tracking.register": "a/b"}, ("tracking.register",)),
    ({"data.train": ["{place}/labelled/train", "{place}/triplet/train"]}, ("data.train",)),
    ({"data.train": "{place}/images"}, ("data.train",)),
    ({"loss": {"name": "info_nce", "matryoshka": [99]}}, ("matryoshka",)),
    ({"loss": {"name": "info_nce", "memory": 10, "matryoshka": [4]}}, ("matryoshka", "memory")),
    ({"loss": {"name": "triplet", "miner": "all", "p": 3}}, ("loss.p",)),
    ({"loss": {"name": "arcface", "dim": 5}}, ("loss.dim",)),
    ({"loss": {"name": "arcface", "num_classes": 3}}, ("loss.num_classes",)),
    ({"loss": [{"name": "info_nce", "weight": float("nan")}, {"name": "triplet", "miner": "all"}]}, ("weight",)),
    ({"loss": {"name": "os:getcwd"}}, ("loss.name", "loss 'os:getcwd'")),
    ({"loss": {"name": ".x:y"}}, ("loss.name", "loss '.x:y'")),
    ({"encoder": {"name": "builtins:dict"}}, ("encoder.name", "encoder 'builtins:dict'")),
    ({"optim.name": "builtins:dict"}, ("optim.name", "optim 'builtins:dict'")),
)
