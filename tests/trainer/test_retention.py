"""Which checkpoints stay, in folders and behind URLs."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch

from trainer import checkpoints
from trainer.checkpoints import About, Snapshot
from trainer.retention import superfluous
from trainer.stores import FolderStore, Store, UrlStore, open_store


@pytest.fixture(params=["folder", "memory://", "file://"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = {"folder": tmp_path / "c", "memory://": f"memory://{uuid.uuid4().hex}/c", "file://": f"file://{tmp_path}/c"}
    found = open_store(place[request.param])
    assert isinstance(found, FolderStore if request.param == "folder" else UrlStore)
    return found


def save(store: Store, step: int, *, recall: float | None = None, keep: int = 9, best_by: str | None = None) -> None:
    taken = Snapshot({"encoder": {"weight": torch.full((3,), float(step))}}, {"state": {}}, {})
    metric = {} if recall is None else {"recall_at_1": recall}
    checkpoints.save(store, taken, About(step, 10 * step, {}, (), metric), keep=keep, best_by=best_by)


def steps(store: Store) -> list[int]:
    return [int(name.removeprefix("step-")) for name in store.names()]


@pytest.mark.parametrize(
    ("values", "newest", "keep", "dropped"),
    [
        ({}, 5, 1, []),
        ({1: None, 2: None, 3: None}, 3, 2, [1]),
        ({1: 0.9, 2: 0.1, 3: 0.2, 4: None}, 4, 1, [2, 3]),
        ({1: 0.5, 2: 0.5, 3: 0.5}, 3, 1, [2]),
        ({1: float("nan"), 2: 0.1, 3: None}, 3, 1, [1]),
        ({1: None, 2: None, 7: 0.99}, 2, 1, [1, 7]),
        ({1: 0.3, 2: 0.4, 3: 0.9}, 3, 2, [1]),
    ],
)
def test_the_newest_and_the_best_stay(values: dict[int, float | None], newest: int, keep: int, dropped: list[int]) -> None:
    assert superfluous(values, newest, keep=keep) == dropped


def test_only_the_newest_are_kept(store: Store) -> None:
    for step in range(1, 6):
        save(store, step, keep=2)
    assert steps(store) == [5, 4]


def test_the_best_is_kept_too(store: Store) -> None:
    for step, recall in enumerate([0.1, 0.8, None, 0.3, 0.2], start=1):
        save(store, step, recall=recall, keep=1, best_by="recall_at_1")
    assert steps(store) == [5, 2]


def test_a_damaged_later_checkpoint_does_not_push_out_the_good_ones(store: Store) -> None:
    for step in (10, 20, 30):
        save(store, step, keep=3)
    with store.publish("step-00000030") as folder:
        (folder / "state.json").write_text("{}")
    found = checkpoints.search(store)
    assert found.saved is not None
    assert found.saved.step == 20
    save(store, 25, keep=1)  # the run went on from 20
    newest = checkpoints.newest(store)
    assert newest is not None
    assert newest.step == 25
    assert steps(store) == [25]


def test_ten_digits_sort_as_numbers(store: Store) -> None:
    for step in (99_999_999, 100_000_000):
        save(store, step)
    assert steps(store) == [100_000_000, 99_999_999]


def test_a_store_gives_back_what_was_written(store: Store) -> None:
    save(store, 3)
    saved = checkpoints.newest(store)
    assert saved is not None
    assert (saved.step, saved.position) == (3, 30)
    from safetensors.torch import load_file

    with store.fetched(saved.name, "encoder.safetensors") as path:
        assert load_file(path)["weight"].tolist() == [3.0, 3.0, 3.0]


def test_an_upload_that_broke_off_is_passed_over_and_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = UrlStore(f"file://{tmp_path}/c")
    save(store, 1)
    sent: list[str] = []

    def send(self: UrlStore, path: Path, name: str) -> None:
        if len(sent) == 2:
            raise OSError("the network is gone")
        sent.append(name)
        real(self, path, name)

    real = UrlStore._send
    monkeypatch.setattr(UrlStore, "_send", send)
    with pytest.raises(RuntimeError, match=r"cannot write the checkpoint file://.*step-00000002: the network is gone; older"):
        save(store, 2)
    assert not any(name.endswith("state.json") for name in sent)  # it goes last
    found = checkpoints.search(store)
    assert found.saved is not None
    assert found.saved.step == 1
    assert "step-00000002: state.json is missing" in found.skipped[0]
    store.collect()
    assert steps(store) == [1]


def test_a_url_nobody_can_open_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"nosuch://x cannot be opened"):
        checkpoints.newest(open_store("nosuch://x"))
