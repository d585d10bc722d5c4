"""Sources and images at URLs, from stores that behave and stores that do not."""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from pipelines.manifest import Manifest
from pipelines.pack import pack
from tests.pipelines.test_pack import files_of
from tests.pipelines.test_table import write_table

Painter = Callable[..., Image.Image]


class Store(http.server.ThreadingHTTPServer):
    """A folder over HTTP. `answer(path, time)` gives a status other than 200 for the n-th time a path is asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.answer: Callable[[str, int], int] = lambda path, time: 200
        self.asked: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Store

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, directory=str(arguments[2].root))

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        status = self.server.answer(self.path, self.server.asked[self.path])
        if status == 200:
            super().do_GET()
        elif status == 0:  # fewer bytes than promised
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"short")
        else:
            self.send_error(status)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The folder of images as a store; pauses between tries are short."""
    monkeypatch.setattr("pipelines.urls.PAUSE_S", 0.01)
    server = Store(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def by_url(path: Path, folder: Path, url: str) -> Path:
    """A table of the folder's images, 50 of them by URL."""
    images = [file.relative_to(folder) for file in sorted(folder.rglob("*.png"))]
    cells = [f"{url}/{image}".replace(" ", "%20") if i >= 6 else str(folder / image) for i, image in enumerate(images)]
    return write_table(path, {"image": cells, "label": [image.parts[0] for image in images]})


def test_a_remote_folder_gives_the_bytes_of_a_local_one(tmp_path: Path, folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/images/", recursive=True)
    memory.pipe("/images/.hidden/a.png", b"x")
    memory.pipe("/images/klasse 0/notes.txt", b"x")
    summary = pack("memory://images", tmp_path / "remote", eval_fraction=0.3)
    pack(folder, tmp_path / "local", eval_fraction=0.3)
    assert files_of(tmp_path / "remote") == files_of(tmp_path / "local")
    assert summary.ignored == 2


def test_a_folder_on_a_web_server_can_be_packed(tmp_path: Path, folder: Path, store: Store) -> None:
    pack(store.url, tmp_path / "remote", workers=2)
    pack(folder, tmp_path / "local")
    assert files_of(tmp_path / "remote") == files_of(tmp_path / "local")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_remote_table_names_images_beside_it(tmp_path: Path, painter: Painter, suffix: str) -> None:
    memory = fsspec.filesystem("memory")
    for i in range(4):
        painter(i).save(tmp_path / f"{i}.png")
        memory.pipe(f"/tables/im/{i}.png", (tmp_path / f"{i}.png").read_bytes())
    memory.pipe("/elsewhere/2.png", (tmp_path / "2.png").read_bytes())
    columns = {"anchor": ["im/0.png", "im/1.png"], "positive": ["memory://elsewhere/2.png", str(tmp_path / "3.png")]}
    memory.pipe(f"/tables/t{suffix}", write_table(tmp_path / f"t{suffix}", columns).read_bytes())
    pack(f"memory://tables/t{suffix}", tmp_path / "out", kind="pair")
    table, data = Manifest.open(tmp_path / "out").table(0), (tmp_path / "out" / "000000.tar").read_bytes()
    packed = {data[offset : offset + size] for offset, size in zip(table.offset, table.size, strict=True)}
    assert packed == {(tmp_path / f"{i}.png").read_bytes() for i in range(4)}


def test_image_bytes_in_a_remote_parquet_are_packed(tmp_path: Path, folder: Path) -> None:
    files = sorted(folder.rglob("*.png"))[:8]
    columns = {"image": [file.read_bytes() for file in files], "label": list("abababab")}
    path = write_table(tmp_path / "t.parquet", columns)
    fsspec.filesystem("memory").pipe("/bytes/t.parquet", path.read_bytes())
    assert pack("memory://bytes/t.parquet", tmp_path / "out").records == 8


def test_what_a_store_gives_late_is_packed_and_what_it_never_gives_is_listed(
    tmp_path: Path, folder: Path, store: Store
) -> None:
    def answer(path: str, time: int) -> int:
        wrong = {"/klasse%205/im%201.png": 404, "/klasse%205/im%202.png": 503, "/klasse%206/im%203.png": 0}
        return wrong.get(path, 500 if time == 1 and "klasse%203" in path else 200)

    store.answer = answer
    summary = pack(by_url(tmp_path / "t.csv", folder, store.url), tmp_path / "out", max_shard_records=20)
    reasons = {name.removeprefix(f"{store.url}/"): reason for name, reason in summary.rejected}
    assert set(reasons) == {"klasse%205/im%201.png", "klasse%205/im%202.png", "klasse%206/im%203.png"}
    assert reasons["klasse%205/im%201.png"] == "no such file"
    assert "3 tries failed" in reasons["klasse%205/im%202.png"]
    assert "503" in reasons["klasse%205/im%202.png"]
    assert summary.records == 53


def test_a_store_that_is_down_stops_the_pack_and_it_goes_on_later(tmp_path: Path, folder: Path, store: Store) -> None:
    table = by_url(tmp_path / "t.csv", folder, store.url)
    store.answer = lambda path, time: 500
    with pytest.raises(RuntimeError, match=rf"{store.url} does not answer: 20 images.*kept.*out\.partial"):
        pack(table, tmp_path / "out", max_shard_records=10)
    fine = Counter[str]()

    def dies(path: str, time: int) -> int:
        fine[path] += 1
        return 200 if sum(fine.values()) < 85 else 503  # after the sample and some chunks

    store.answer = dies
    with pytest.raises(RuntimeError, match=r"not answer.*out\.partial"):
        pack(table, tmp_path / "out", max_shard_records=10)
    assert not (tmp_path / "out").exists()
    store.answer = lambda path, time: 200
    assert pack(table, tmp_path / "out", max_shard_records=10).resumed_chunks >= 2
    pack(table, tmp_path / "whole", max_shard_records=10)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_one_store_of_several_that_is_gone_only_costs_its_images(tmp_path: Path, folder: Path, store: Store) -> None:
    table = by_url(tmp_path / "t.csv", folder, store.url)
    gone = "http://127.0.0.1:1"
    table.write_text("".join(line.replace(store.url, gone) if i % 5 == 0 else line for i, line in enumerate(table.open())))
    summary = pack(table, tmp_path / "out", max_shard_records=20)
    assert {name.startswith(gone) for name, _ in summary.rejected} == {True}
    assert len(summary.rejected) == 10


def test_a_store_that_goes_down_with_the_last_images_does_not_cost_them(tmp_path: Path, folder: Path, store: Store) -> None:
    table = by_url(tmp_path / "t.csv", folder, store.url)
    pack(table, tmp_path / "whole")
    last = Manifest.open(tmp_path / "whole").sources(0)[-5:]
    paths = {name.removeprefix(store.url) for name in last}
    down = [False]

    def answer(path: str, time: int) -> int:
        down[0] |= path in paths and time > 3  # twice for the other pack, once for the sample
        return 500 if down[0] else 200

    store.answer = answer
    with pytest.raises(RuntimeError, match="not answer"):
        pack(table, tmp_path / "out")
    store.answer = lambda path, time: 200
    assert pack(table, tmp_path / "out").records == 56
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_small_set_in_a_store_that_is_down_is_not_called_unreadable(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", {"image": ["http://127.0.0.1:1/a.png"] * 2, "label": ["a", "b"]})
    with pytest.raises(RuntimeError, match="none of 2 images could be fetched"):
        pack(table, tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "message"),
    [("memory://nothing", "no file below"), ("memory://nothing/t.csv", "nothing at"), ("fax://a/b", "fax")],
)
def test_nothing_at_a_url_is_the_users_mistake(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
