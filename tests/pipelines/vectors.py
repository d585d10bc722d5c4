"""Triplets with vectors among their images, and targets, in the forms in which sources hold them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from configs.schema import Augment
from pipelines.batch import Batch
from pipelines.hashing import hash_entity
from tests.pipelines.test_npy import save

COUNT, SIDE, DIM, TARGET_DIM = 22, 16, 5, 3
PLAIN = Augment()


@dataclass
class Truth:
    """`members[i]` of record i in order: images [S, S, 3] uint8 or vectors [DIM] float32; `targets` [n, TARGET_DIM]."""

    members: list[list[NDArray[Any]]]
    targets: NDArray[np.float32]

    @property
    def groups(self) -> dict[int, int]:
        return {hash_entity(f"g{i}"): i for i in range(len(self.members))}


def make_truth(seed: int = 0) -> Truth:
    """Triplets of one or two negatives; any member but one of a record may be a vector."""
    rng = np.random.default_rng(seed)
    members: list[list[NDArray[Any]]] = []
    for i in range(COUNT):
        kinds = ["image", "vector", "image"] + [["vector", "image"][i % 2]] * (i % 3 == 0)
        kinds = kinds if i % 4 else [kinds[1], kinds[0], *kinds[2:]]
        members.append(
            [
                rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                if kind == "image"
                else rng.standard_normal(DIM).astype(np.float32)
                for kind in kinds
            ]
        )
    return Truth(members, rng.standard_normal((COUNT, TARGET_DIM)).astype(np.float32))


def encode(member: NDArray[Any]) -> tuple[str, bytes]:
    if member.ndim == 1:
        return "npy", save(member.astype(np.float64))
    file = io.BytesIO()
    Image.fromarray(member).save(file, "PNG")
    return "png", file.getvalue()


def write_files(folder: Path, truth: Truth) -> Path:
    """A CSV of paths, to images and to `.npy` files."""
    rows = ["anchor,positive,negative0,negative1,group,target"]
    for i, members in enumerate(truth.members):
        names = []
        for number, (suffix, data) in enumerate(map(encode, members)):
            names.append(f"{i}-{number}.{suffix}")
            (folder / names[-1]).write_bytes(data)
        np.save(folder / f"{i}-target.npy", truth.targets[i])
        rows.append(",".join([*names, *[""] * (4 - len(names)), f"g{i}", f"{i}-target.npy"]))
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    return folder / "t.csv"


def write_tars(folder: Path, truth: Truth) -> Path:
    """As other people write them."""
    folder.mkdir()
    with wds.ShardWriter(str(folder / "s-%02d.tar"), maxcount=9, verbose=0) as writer:
        for i, members in enumerate(truth.members):
            names = ["anchor", "positive", *(["negative"] if len(members) == 3 else ["negative0", "negative1"])]
            sample: dict[str, Any] = {"__key__": f"r{i}", "json": {"group": f"g{i}"}, "target.npy": truth.targets[i]}
            for name, (suffix, data) in zip(names, map(encode, members), strict=True):
                sample[f"{name}.{suffix}"] = data
            writer.write(sample)
    return folder


def assert_true(batches: Iterable[Batch], truth: Truth) -> list[int]:
    """Every row of every valid record holds what was packed; the records' numbers."""
    seen = []
    for batch in batches:
        place = torch.arange(batch.num_rows) if batch.place is None else batch.place
        k = len(batch.images)
        assert batch.target is not None
        assert len(batch.draws) == k
        for record in range(batch.num_records):
            rows = torch.nonzero(batch.record == record).flatten().tolist()
            if not batch.valid[rows].all():
                assert not batch.valid[rows].any()
                continue
            seen.append(truth.groups[int(batch.group[rows[0]])])
            members = truth.members[seen[-1]]
            assert batch.view[rows].tolist() == list(range(len(members)))
            for row, member in zip(rows, members, strict=True):
                at = int(place[row])
                if member.ndim == 1:
                    assert batch.vectors is not None
                    found = batch.vectors[at - k].numpy()
                else:
                    found = batch.images[at].permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(found, member)
                np.testing.assert_array_equal(batch.target[row].numpy(), truth.targets[seen[-1]])
    return seen
