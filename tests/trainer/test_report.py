"""The report is one page that says what it was given, opens without a network and breaks on no input."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainer.report.charts import Extent, loss_chart, metric_chart
from trainer.report.contact import FRAME, GAP, RIGHT, THUMB, WRONG, Tile, lighter, montage, thumbnail
from trainer.report.data import Evaluation, Health, ReportData, Start, read_series
from trainer.report.insight import Insight, Picture, look
from trainer.report.page import write_report


class Page(HTMLParser):
    """Tags with their attributes, and the text outside style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self.hidden else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def image(colour: object, mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")  # type: ignore[arg-type]
    return buffer.getvalue()


class Set:
    """Rows of classes with such names, their pictures of the class's colour."""

    def __init__(self, names: list[str], each: int) -> None:
        self.names, self.group = names, torch.arange(len(names)).repeat_interleave(each)
        self.shown = torch.ones(len(self.group), dtype=torch.bool)

    def picture(self, row: int) -> Picture:
        group = int(self.group[row])
        return Picture(image((10 * group % 256, 99, row % 256)) if self.shown[row] else None, self.names[group])

    def name_of(self, group: int) -> str:
        return self.names[group]

    def given(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([[0, 1]]), torch.tensor([[0, len(self.group) - 1]])


def vectors(found: Set, noise: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(len(found.names), 8, generator=generator)
    return F.normalize(middles[found.group] + noise * torch.randn(len(found.group), 8, generator=generator), dim=1)


def insight(names: list[str] | None = None, each: int = 4) -> Insight:
    shown = Set(names or ["<dog> & 'co'", "写真", *(f"class {i}" for i in range(10))], each)
    found = look(shown, vectors(shown, 0.9), vectors(shown, 2.0))
    assert found is not None
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [{"step": s, "time": 1.0, "train/loss": 5 / (s + 1), "train/wait_share": 0.1} for s in range(0, 300, 5)]
    lines += [{"step": s, "time": 1.0, "val/recall_at_1": 0.2 + s / 1000, "val/recall_at_5": 0.4} for s in (0, 150, 300)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30', encoding="utf-8")
    return tmp_path


AFTER = {"map_at_r": 0.4, "recall_at_1": 0.6234, "recall_at_1_low": 0.6, "recall_at_1_high": 0.65, "num_queries": 99.0}
LEAKAGE = {
    "pairs": [
        {"train": "t1", "eval": "e1", "kind": "same", "score": 1.0},
        {"train": "t2", "eval": "<e2>", "kind": "near", "score": 3},
    ],
    "checked": {"train_images": 1200},
}


def full() -> ReportData:
    starts = [Start("2026-01-02 10:00:00", 2, 0), Start("2026-01-02 10:05:00", 2, 100, "rank 1 was killed", ["step 120: cut"])]
    bad = [{"shard": "000001.tar", "key": "k7", "source": "a/b.jpg", "offset": 4, "reason": "CRC32 is <other>"}]
    return ReportData(
        "emoji",
        AFTER,
        {"recall_at_1": 0.2049, "map_at_r": 0.1},
        steps=1000,
        wall_s=163.2,
        num_workers=2,
        evaluation=Evaluation(452, 1804, 1804, classes_unseen=True),
        insight=insight(),
        health=Health(bad=bad, starts=starts),
        leakage=LEAKAGE,
        config_yaml="name: emoji",
        load='import mlflow\nmlflow.pyfunc.load_model("models:/emoji@champion")',
        ui_command="mlflow ui",
    )


def test_the_page_tells_what_it_was_given(run: Path) -> None:
    path = write_report(run, full())
    page = Page(path.read_text(encoding="utf-8"))
    said = ("It learned", "62 of 100 searches", "0.205", "0.623", "Interval 0.600 to 0.650", "MAP@R", "452", "1,804", "1,000")
    said += ("2 min 43 s", "<dog> & 'co'", "写真", "rank 1 was killed", "passed over: step 120: cut", "CRC32 is <other>")
    said += ("2 images of the evaluation set are in the training set", "<e2>", "train images 1200", "10.0\xa0% of its time")
    for text in (*said, 'load_model("models:/emoji@champion")', "name: emoji", "mlflow ui"):
        assert text in page.text, text
    assert "Num queries" not in page.text
    assert "Recall@1 low" not in page.text
    assert all(a.get("alt") for a in page.all("img"))
    assert all(a.get("aria-label") for a in page.all("svg"))
    assert {"right: 写真", "query: 写真"} & {a["alt"] for a in page.all("img")}
    targets = {a["id"] for _, a in page.tags if "id" in a}
    assert all((a["href"] or "")[1:] in targets for a in page.all("a"))
    beside = {p.name for p in path.parent.iterdir()}
    assert {"neighbours.png", "mistakes.png", "confusion.png", "map-after.svg", "map-before.png", "loss.png"} <= beside
    for file in beside - {"index.html"}:
        if file.endswith(".png"):
            Image.open(path.parent / file).load()
        else:
            assert "var(--" not in (path.parent / file).read_text()
            ET.parse(path.parent / file)


def test_the_page_asks_nothing_of_the_network_and_repeats_no_id(run: Path) -> None:
    text = write_report(run, full()).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    assert "@import" not in text
    links = [value or "" for _, attrs in page.tags for key, value in attrs.items() if key in ("href", "xlink:href", "src")]
    assert all(link.startswith(("#", "data:")) for link in links)
    pictures = [link.partition(",")[2] for link in links if link.startswith("data:image/webp;base64,")]
    assert len(pictures) > 50
    for data in set(pictures):
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|data:[^"]*', "", text)


def test_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path / "run", ReportData("bare")).read_text(encoding="utf-8"))
    assert "bare" in page.text
    assert "Nothing logged yet" in page.text
    for absent in ("What it finds", "Curves", "Numbers", "Use it", "Config", "None", "Duplicates"):
        assert absent not in page.text
    assert [p.name for p in (tmp_path / "run" / "report").iterdir()] == ["index.html"]


def test_a_run_that_is_not_finished_says_so(run: Path) -> None:
    data = ReportData("x", {"recall_at_1": 0.5}, {"recall_at_1": 0.2}, status="", steps=300, of_steps=900, notes=["A <note>."])
    page = Page(write_report(run, data).read_text(encoding="utf-8"))
    for text in ("not finished: step 300 of 900", "It is learning", "A <note>."):
        assert text in page.text


@pytest.mark.parametrize(("names", "each"), [(["only"], 2), (["a", "b"], 1), (["a", "b"], 2), (["写真"], 7), (["x"] * 9, 12)])
def test_small_and_odd_sets_have_a_page_too(run: Path, names: list[str], each: int) -> None:
    data = ReportData("x", insight=insight(names, each), evaluation=Evaluation(len(names), len(names) * each))
    assert names[0] in write_report(run, data).read_text(encoding="utf-8")


def test_vectors_among_the_rows_are_shown_by_their_name(run: Path) -> None:
    shown = Set([f"class {i}" for i in range(6)], 2)
    shown.shown[1::2] = False
    data = ReportData("x", insight=look(shown, vectors(shown, 0.5)))
    assert '<div class="text">class 3</div>' in write_report(run, data).read_text(encoding="utf-8")
    assert look(shown, vectors(shown, 0.5)[:1]) is None


def test_a_report_written_twice_is_the_same_bytes(run: Path) -> None:
    first = {p.name: p.read_bytes() for p in write_report(run, full()).parent.iterdir()}
    assert {p.name: p.read_bytes() for p in write_report(run, full()).parent.iterdir()} == first


def test_a_disk_that_refuses_gives_one_message(run: Path) -> None:
    (run / "report").write_text("a file in the way")
    with pytest.raises(RuntimeError, match="the report could not be written to"):
        write_report(run, ReportData("emoji"))


def test_right_hits_are_framed_green_and_wrong_ones_red() -> None:
    blue, clear = Picture(image((0, 0, 250), size=(40, 40)), "cat"), Picture(image((9, 9, 9, 0), "RGBA"), "dog")
    rows = [[Tile(blue, "cat"), Tile(blue, "cat", True), Tile(clear, "dog", False), Tile(Picture(None, "a vector"), "", True)]]
    sheet = np.asarray(Image.open(io.BytesIO(montage(rows))))
    lefts = [GAP + column * (THUMB + GAP) for column in (1, 2)]
    frames = [sheet[GAP + THUMB // 2, left - FRAME + 2].tolist() for left in lefts]
    assert ["#" + bytes(frame).hex() for frame in frames] == [RIGHT, WRONG]
    assert sheet[GAP + THUMB // 2, lefts[0] + THUMB // 2].tolist() == [0, 0, 250]
    assert sheet[GAP + THUMB // 2, lefts[1] + THUMB // 2].tolist() == [255, 255, 255]  # transparent is white


def test_a_heavy_picture_becomes_light_and_one_that_cannot_be_read_a_grey_square() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn
    noise.save(buffer, "JPEG", exif=exif)
    light = lighter(buffer.getvalue())
    assert len(light) < len(buffer.getvalue()) / 4
    assert Image.open(io.BytesIO(light)).size == (2 * THUMB, 2 * THUMB)
    assert Image.open(io.BytesIO(light)).getpixel((2, THUMB)) == (255, 255, 255)  # a border beside what stands upright
    assert lighter(b"small") == b"small"
    assert thumbnail(b"no image").getpixel((5, 5)) == thumbnail(b"no image").getpixel((90, 90)) == (232, 234, 238)


def test_curves_are_svg_in_the_pages_colours_and_files_in_their_own() -> None:
    extent = Extent(500, [120])
    for chart in (
        loss_chart([(0, 2.0), (1, 1.0)], extent),
        loss_chart([(i, 1.0) for i in range(500)], extent),
        metric_chart({"Recall@1": [(0, 0.1), (9, 0.5)]}, extent),
    ):
        root = ET.fromstring(chart.inline.replace("xlink:", ""))
        assert root.attrib["viewBox"]
        assert "var(--accent)" in chart.inline
        assert "var(--" not in chart.svg.decode()
        assert Image.open(io.BytesIO(chart.png)).size[0] > 300


def test_a_step_that_was_done_twice_counts_once_and_broken_numbers_not_at_all(tmp_path: Path) -> None:
    spool = tmp_path / "metrics.jsonl"
    spool.write_text(
        '{"step": 3, "x": 1.5}\n{"step": 1, "x": 4, "note": "y"}\n{"step": 3, "x": 9}\n{"step": 2, "x": NaN}\n{"st'
    )
    assert read_series(spool) == {"x": [(1, 4.0), (3, 1.5)]}
    assert read_series(tmp_path / "absent.jsonl") == {}
