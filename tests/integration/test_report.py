"""`nearfar report` on runs that were trained: before and after, warm, unfinished, damaged; and how it looks in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from cluster.gallery import Gallery
from cluster.reporting import untrained_encoder
from cluster.runfolder import RunFolder
from tests import chromium
from tests.conftest import Answer
from tests.integration.conftest import Reference
from trainer.report.search import search

Nearfar = Callable[..., Answer]


def text_of(answer: Answer) -> str:
    """What the page says, without tags."""
    assert answer.code == 0, answer.err
    page = Path(answer.out.strip()).read_text(encoding="utf-8")
    return unescape(re.sub(r"<style>.*?</style>|<[^>]*>", "", page, flags=re.DOTALL))


@pytest.fixture
def copied(small: Reference, tmp_path: Path) -> RunFolder:
    """The small run, to be damaged."""
    return RunFolder(Path(shutil.copytree(small[1]["run"], tmp_path / "runs" / "one")))


def recall_before(run: Path) -> float:
    """Of the encoder that is rebuilt from the config, by the report's own search."""
    folder = RunFolder(run)
    config = folder.config()
    with Gallery(config, untrained_encoder(config, folder)) as gallery:
        found = search(gallery.found.vectors, gallery.group)
        return 1 - float(found.wrong.sum()) / float((found.others > 0).sum())


def test_the_encoder_before_training_is_the_one_that_the_run_began_with(small: Reference) -> None:
    assert recall_before(Path(small[1]["run"])) == pytest.approx(small[1]["before"]["recall_at_1"], abs=1e-9)


def test_a_warm_start_is_what_a_run_began_with(small: Reference, nearfar: Nearfar) -> None:
    config, first = small
    settings = ["name=warm", f"encoder.init={first['run']}", "train.steps=2", "optim.warmup_steps=1", "cluster.workers=1"]
    answer = nearfar("train", config, "--local", "--json", *(word for one in settings for word in ("--set", one)))
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert result["before"]["recall_at_1"] > first["before"]["recall_at_1"] + 0.05
    assert recall_before(Path(result["run"])) == pytest.approx(result["before"]["recall_at_1"], abs=1e-9)


def test_a_run_that_is_still_training_is_shown_as_far_as_it_is(copied: RunFolder, nearfar: Nearfar) -> None:
    copied.result_file.unlink()
    newest = sorted((copied.path / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    lines = copied.metrics.read_text().splitlines(keepends=True)
    copied.metrics.write_text("".join(lines[:-3]) + '{"step": 28, "tr')
    (copied.path / "leakage.json").write_text('{"pairs": [], "checked": {"train": 9}}')
    said = text_of(nearfar("report", copied.path))
    assert "not finished: step 27 of 30" in said
    assert "The pictures are of the newest checkpoint, of step 24." in said
    assert "What it finds" in said
    assert "No image of the evaluation set was found in the training set." in said
    shutil.rmtree(copied.path / "checkpoints")
    (copied.path / "leakage.json").write_text("{")
    said = text_of(nearfar("report", copied.path))
    assert "There is no checkpoint yet" in said
    assert "leakage.json cannot be read" in said
    assert "Curves" in said
    assert "What it finds" not in said


def test_a_run_without_evaluation_has_curves_and_one_whose_images_are_gone_says_so(copied: RunFolder, nearfar: Nearfar) -> None:
    config = copied.config()
    gone = config.model_copy(update={"data": config.data.model_copy(update={"eval": str(copied.path / "gone")})})
    copied.claim(gone)
    said = text_of(nearfar("report", copied.path))
    assert "There are no pictures: no folder" in said
    copied.claim(config.model_copy(update={"data": config.data.model_copy(update={"eval": None})}))
    copied.metrics.write_text("".join(line for line in copied.metrics.open() if "val/" not in line))
    said = text_of(nearfar("report", copied.path))
    assert "Without data.eval nothing tells" in said
    assert "What it finds" not in said


@pytest.mark.acceptance
def test_the_report_of_emoji_looks_right_in_a_browser_and_names_what_is_confused(
    emoji: Reference, nearfar: Nearfar, tmp_path: Path
) -> None:
    page = Path(nearfar("report", emoji[1]["run"]).out.strip())
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert any(re.search(r"flag|face|clock|family|keycap|woman|man", title) for title in titles), titles
    assert len(text.encode()) < 5e6
    if chromium.program() is None:
        pytest.skip("there is no chromium on the PATH, so nobody looked at the page")
    for width in (1280, 390, 360):
        light, dark = (chromium.look(page, width=width, dark=dark) for dark in (False, True))
        for seen, name in ((light, "light"), (dark, "dark")):
            (tmp_path / f"report-{width}-{name}.png").write_bytes(seen.png)
            assert seen.measured["width"] <= seen.measured["inner"] == width
            assert seen.measured["images"] > 300
            assert seen.measured["broken"] == 0
            assert seen.requests == []
        assert light.measured["background"] != dark.measured["background"]
    print(f"\nscreenshots in {tmp_path}")
