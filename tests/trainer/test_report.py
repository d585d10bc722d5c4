"""The report is one page that says what it was given, opens without a network and breaks on no input."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.report.charts import loss_chart, metric_chart
from trainer.report.contact import FRAME, GAP, THUMB, montage
from trainer.report.data import Neighbour, ReportData, Sheet, read_series
from trainer.report.page import duration, label, write_report


class Page(HTMLParser):
    """Tags with their attributes, and the text outside style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def image(colour: object, mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")  # type: ignore[arg-type]
    return buffer.getvalue()


def sheets() -> list[Sheet]:
    right = Neighbour(image((0, 0, 250), size=(40, 40)), "cat", 0.91, True)
    wrong = Neighbour(image((9, 9, 9, 0), "RGBA"), "<dog> & 'co'", 0.72, False)
    return [Sheet(image(7, "L"), "cat", [right, wrong]), Sheet(image((1, 2, 3)), "a very long name of a class", [wrong])]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [{"step": s, "time": 1.0, "train/loss": 5 / (s + 1)} for s in range(0, 300, 5)]
    lines += [{"step": s, "time": 1.0, "val/recall_at_1": 0.2 + s / 1000, "val/recall_at_5": 0.4} for s in (0, 150, 300)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30', encoding="utf-8")
    return tmp_path


def test_the_page_tells_what_it_was_given(run: Path) -> None:
    after, before = {"map_at_r": 0.4, "recall_at_1": 0.6234, "num_queries": 99.0}, {"recall_at_1": 0.2049, "map_at_r": 0.1}
    facts = {"num_classes": 452, "num_images": 1804, "steps": 1000, "wall_s": 163.2, "num_workers": 2}
    use = {"load_uri": "models:/emoji@champion", "config_yaml": "name: emoji", "ui_command": "mlflow ui"}
    path = write_report(run, ReportData("emoji", after, before, sheets=sheets(), **facts, **use))
    page = Page(path.read_text(encoding="utf-8"))
    said = ("Recall@1 on classes never seen", "0.205 →", "0.623", "MAP@R", "452", "1,804", "1,000", "2 min 43 s")
    for text in (*said, "<dog>", "0.91", 'load_model("models:/emoji@champion")', "name: emoji", "mlflow ui"):
        assert text in page.text or any(text in (a.get("alt") or "") for a in page.all("img")), text
    assert "99" not in page.text
    assert len(page.all("img")) == 5
    assert [a["alt"] for a in page.all("img")][1:3] == ["right: cat", "wrong: <dog> & 'co'"]
    assert len(page.all("svg")) == 2
    assert sorted(p.name for p in path.parent.iterdir()) == ["index.html", "neighbours.png"]


def test_the_page_asks_nothing_of_the_network_and_repeats_no_id(run: Path) -> None:
    path = write_report(run, ReportData("emoji", {"recall_at_1": 0.5}, sheets=sheets()))
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.all("script")
    assert not page.all("link")
    assert all((a["src"] or "").startswith("data:image/png;base64,") for a in page.all("img"))
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("href", "xlink:href", "src")]
    assert all((link or "").startswith(("#", "data:")) for link in links)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    path = write_report(tmp_path / "run", ReportData("bare", {}))
    page = Page(path.read_text(encoding="utf-8"))
    assert "bare" in page.text
    for absent in ("What it finds", "How it learned", "Evaluation", "Use it", "Configuration", "None"):
        assert absent not in page.text
    assert not (path.parent / "neighbours.png").exists()


def test_a_report_written_twice_is_the_same_bytes(run: Path) -> None:
    data = ReportData("emoji", {"recall_at_1": 0.5}, sheets=sheets())
    first = {p.name: p.read_bytes() for p in write_report(run, data).parent.iterdir()}
    assert {p.name: p.read_bytes() for p in write_report(run, data).parent.iterdir()} == first


def test_a_disk_that_refuses_gives_one_message(run: Path) -> None:
    (run / "report").write_text("a file in the way")
    with pytest.raises(RuntimeError, match="the report could not be written to"):
        write_report(run, ReportData("emoji", {}))


def test_right_hits_are_framed_green_and_wrong_ones_red() -> None:
    sheet = np.asarray(Image.open(io.BytesIO(montage(sheets()))))
    lefts = [GAP + column * (THUMB + GAP) + GAP for column in (1, 2)]
    right, wrong = (sheet[GAP + THUMB // 2, left - FRAME + 2].tolist() for left in lefts)
    assert right[1] > 1.5 * right[0]
    assert wrong[0] > 1.5 * wrong[1]
    assert sheet[GAP + THUMB // 2, lefts[0] + THUMB // 2].tolist() == [0, 0, 250]
    assert sheet[GAP + THUMB // 2, lefts[1] + THUMB // 2].tolist() == [255, 255, 255]  # transparent is white


def test_curves_are_svg_in_the_pages_colours() -> None:
    for svg in (
        loss_chart([(0, 2.0), (1, 1.0)]),
        loss_chart([(i, 1.0) for i in range(500)]),
        metric_chart({"Recall@1": [(0, 0.1), (9, 0.5)]}),
    ):
        root = ET.fromstring(svg.replace("xlink:", ""))
        assert root.attrib["viewBox"]
        assert "#0101" not in svg
        assert "var(--accent)" in svg


def test_a_step_that_was_done_twice_counts_once_and_broken_numbers_not_at_all(tmp_path: Path) -> None:
    spool = tmp_path / "metrics.jsonl"
    spool.write_text(
        '{"step": 3, "x": 1.5}\n{"step": 1, "x": 4, "note": "y"}\n{"step": 3, "x": 9}\n{"step": 2, "x": NaN}\n{"st'
    )
    assert read_series(spool) == {"x": [(1, 4.0), (3, 1.5)]}
    assert read_series(tmp_path / "absent.jsonl") == {}


def test_names_and_durations_are_written_for_people() -> None:
    assert [label(n) for n in ("recall_at_1", "val/recall_at_10", "map_at_r", "effective_rank")] == [
        "Recall@1",
        "Recall@10",
        "MAP@R",
        "Effective rank",
    ]
    assert [duration(s) for s in (0.4, 59.6, 134.2, 7322)] == ["0 s", "1 min 0 s", "2 min 14 s", "2 h 2 min"]
