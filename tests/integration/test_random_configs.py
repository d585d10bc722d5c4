"""Hundreds of random configs: each is refused with one message that names the setting, or it trains."""

from __future__ import annotations

import json
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.registry import PARTS
from tests.configs.random_configs import NUM_BAD, NUM_CHANGED, Case, bad_config, changed_config
from tests.configs.subjects import all_subjects
from tests.conftest import Answer

Nearfar = Callable[..., Answer]
RAW = re.compile(r"validation error|pydantic|input_value|Traceback|object at 0x|size mismatch|enforce fail")
MOST_S, MOST_BYTES, MOST_SIGNS = 30, 3 * 2**30, 3000
SAMPLE, TRAINED = 8, 50  # every so many are checked and trained by `make test`, all by `make acceptance`
QUICK = (
    "finish.report=false",
    "finish.onnx=false",
    "train.steps=2",
    "train.epochs=null",
    "optim.warmup_steps=0",
    "cluster.workers=1",
    "tracking.enabled=false",
)
BAD = [(bad_config, seed) for seed in range(NUM_BAD)]
CHANGED = [(changed_config, seed) for seed in range(NUM_CHANGED)]


def named(cases: list[tuple[Callable[..., Case], int]]) -> list[object]:
    return [pytest.param(make, seed, id=f"{make.__name__}-{seed}") for make, seed in cases]


@pytest.fixture(scope="session")
def place(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 digits as data of three kinds, with targets, and things that are no data: an empty folder, a file, images."""
    from pipelines.pack import pack

    root = tmp_path_factory.mktemp("random")
    (root / "images").symlink_to(digits.parent / "images")
    classes = sorted(path for path in (root / "images").iterdir() if path.is_dir())
    files = [[str(file.relative_to(root)) for file in sorted(folder.glob("*"))[:30]] for folder in classes]
    targets = np.random.default_rng(0).standard_normal((len(files), 16)).astype(np.float32).tolist()
    kinds: dict[str, list[dict[str, object]]] = {"labelled": [], "labelled_pair": [], "triplet": []}
    for number, own in enumerate(files):
        other = files[number - 1]
        for i, file in enumerate(own):
            kinds["labelled"].append({"image": file, "label": str(number), "target": targets[number]})
            kinds["labelled_pair"].append({"left": file, "right": (own if i % 2 else other)[i - 1], "match": i % 2})
            kinds["triplet"].append({"anchor": file, "positive": own[i - 1], "negative": other[i], "group": str(number)})
    for kind, rows in kinds.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pack(root / f"{kind}.jsonl", root / kind, kind=kind, eval_fraction=0.2, split="record")
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    return root


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random path may be a relative one."""
    monkeypatch.chdir(tmp_path)


def assert_clear(answer: Answer, case: Case) -> None:
    """Accepted, or refused in one message that names what was changed."""
    assert answer.code in (0, 2), answer
    if answer.code == 0:
        return
    messages = re.split(r"^nearfar: ", answer.err, flags=re.MULTILINE)
    assert len(messages) == 2, answer.err
    assert (messages[0], answer.out) == ("", ""), answer
    assert not RAW.search(answer.err), answer.err
    assert len(answer.err) <= MOST_SIGNS, answer.err
    assert any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer.err) for word in case.words), (case.words, answer.err)


def check(nearfar: Nearfar, case: Case, file: Path) -> Answer:
    """`nearfar check`, which may take neither long nor much memory."""
    file.write_bytes(case.text)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = nearfar("check", file)
    assert time.perf_counter() - started < MOST_S
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES
    assert_clear(answer, case)
    return answer


def train(nearfar: Nearfar, case: Case, file: Path, place: Path) -> None:
    """Two steps of a config that was accepted."""
    shutil.rmtree(place / "runs", ignore_errors=True)
    settings = [word for setting in QUICK for word in ("--set", setting)]
    answer = nearfar("train", file, "--local", *settings)
    assert answer.code in (0, 1, 2), answer
    if answer.code:  # 1: it is the data that training cannot go on with
        last = answer.err[answer.err.rindex("nearfar: ") :]  # after what was told on the way
        assert_clear(Answer(2, answer.out, last), Case(case.text, (*case.words, "optim.milestones")))


@pytest.mark.parametrize(("make", "seed"), named(BAD[::SAMPLE] + CHANGED[::SAMPLE]))
def test_a_random_config_is_accepted_or_refused_clearly(
    nearfar: Nearfar, place: Path, tmp_path: Path, make: Callable[[int, Path], Case], seed: int
) -> None:
    check(nearfar, make(seed, place), tmp_path / "run.yaml")


@pytest.mark.parametrize(("make", "seed"), named(CHANGED[::TRAINED]))
def test_a_random_config_that_is_accepted_trains(
    nearfar: Nearfar, place: Path, tmp_path: Path, make: Callable[[int, Path], Case], seed: int
) -> None:
    case, file = make(seed, place), tmp_path / "run.yaml"
    if check(nearfar, case, file).code == 0:
        train(nearfar, case, file, place)


@pytest.mark.acceptance
@pytest.mark.parametrize(("make", "seed"), named(BAD + CHANGED))
def test_every_random_config_trains_or_is_refused_clearly(
    nearfar: Nearfar, place: Path, tmp_path: Path, make: Callable[[int, Path], Case], seed: int
) -> None:
    case, file = make(seed, place), tmp_path / "run.yaml"
    if check(nearfar, case, file).code == 0:
        train(nearfar, case, file, place)


def test_every_setting_and_every_name_has_its_turn_among_the_random_configs(tmp_path: Path) -> None:
    cases = [bad_config(seed, tmp_path) for seed in range(NUM_BAD)]
    words = {word for case in cases for word in case.words}
    missing = [subject.path for subject in all_subjects() if ".".join(subject.path) not in words]
    assert not missing
    text = b"\n".join(case.text for case in cases).decode(errors="replace")
    names = [name for kind in ("encoder", "loss", "optim") for name in PARTS[kind]]
    assert [name for name in [*names, "cosine", "linear", "constant", "step"] if f": {name}\n" not in text] == []


def test_a_random_config_is_a_function_of_its_seed(tmp_path: Path) -> None:
    assert bad_config(25, tmp_path) == bad_config(25, tmp_path) != bad_config(26, tmp_path)
    assert changed_config(25, tmp_path) == changed_config(25, tmp_path) != changed_config(26, tmp_path)
