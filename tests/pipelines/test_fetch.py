"""The data sets that `nearfar fetch` knows, without a network."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from configs.registry import PARTS, resolve
from pipelines.pack import pack
from pipelines.sources import digits, emoji, fashion_mnist
from pipelines.sources.npm import cache_folder, download, explain, tarball_name

Painter = Callable[..., Image.Image]

FILES = {
    "noto": ["1f600.png", "0023-fe0f-20e3.png", "1f44b-1f3fb.png", "1f468-200d-1f373.png"],
    "blob": ["1f600.png", "0023-20e3.png"],
    "twemoji": ["1f600.png", "../../../../evil.png", "../sheets/64.png"],
    "fluent": ["1f600.webp", "23-fe0f-20e3.webp", "1f3f4-e0067_e0062_e007f.webp"],
}

NAMES = [
    {
        "name": "GRINNING FACE",
        "unified": "1F600",
        "short_name": "grinning",
        "short_names": ["grinning"],
        "category": "Smileys & Emotion",
        "subcategory": "face-smiling",
    },
    {
        "name": None,
        "unified": "0023-FE0F-20E3",
        "short_name": "hash",
        "short_names": ["hash"],
        "category": "Symbols",
        "subcategory": "keycap",
    },
]


@pytest.fixture
def cache(tmp_path: Path, painter: Painter) -> Path:
    """A cache with small packages of the shape of the real ones."""
    folder = tmp_path / "cache"
    folder.mkdir()
    seed = 0
    for style in emoji.STYLES:
        with tarfile.open(folder / tarball_name(style.package), "w:gz") as tar:
            for name in ["package.json", *FILES[style.name]]:
                seed += 1
                buffer = io.BytesIO(b"{}")
                if "." in name and not name.endswith("json"):
                    painter(seed, mode="RGBA").save(buffer := io.BytesIO(), name.rpartition(".")[2].upper())
                info = tarfile.TarInfo(f"{style.folder}/{name}" if name != "package.json" else f"package/{name}")
                info.size = buffer.getbuffer().nbytes
                buffer.seek(0)
                tar.addfile(info, buffer)
            if style.package == emoji.NAMES:
                _add_json(tar, "package/emoji.json", NAMES)
    with tarfile.open(folder / tarball_name(emoji.KEYWORDS), "w:gz") as tar:
        _add_json(
            tar,
            "package/dist/emoji-en-US.json",
            {"\U0001f600": ["grinning_face", "face", ":D"], "\U0001f1e9\U0001f1ea": ["de"]},
        )
    return folder


def _add_json(tar: tarfile.TarFile, name: str, what: object) -> None:
    data = json.dumps(what).encode()
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_emoji_are_sorted_into_classes_by_their_code_points(tmp_path: Path, cache: Path) -> None:
    told: list[tuple[int, int | None]] = []
    summary = emoji.fetch(tmp_path / "out", cache=cache, progress=lambda done, total: told.append((done, total)))
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert found == {
        "LICENCES.md",
        "texts.jsonl",
        *(f"1f600/{style}.png" for style in ("noto", "blob", "twemoji")),
        "1f600/fluent.webp",
        "23-20e3/noto.png",
        "23-20e3/blob.png",
        "23-20e3/fluent.webp",
        "1f468-1f373/noto.png",
        "1f3f4-e0067-e0062/fluent.webp",
    }
    assert (summary.classes, summary.images) == (4, 9)
    assert told == [(5, 5), *((i + 1, 9) for i in range(9))]
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("cache", "out")] == []
    with tarfile.open(cache / "emoji-datasource-google-16.0.0.tgz") as tar:
        member = tar.extractfile("package/img/google/64/1f600.png")
        assert member is not None
        assert (tmp_path / "out" / "1f600" / "noto.png").read_bytes() == member.read()
    notes = (tmp_path / "out" / "LICENCES.md").read_text("utf-8")
    assert all(words in notes for words in ("Apache-2.0", "CC BY 4.0", "MIT", "emoji-datasource-google@3.0.0"))
    assert pack(tmp_path / "out", tmp_path / "shards").images == 9
    texts = [json.loads(line) for line in (tmp_path / "out" / "texts.jsonl").read_text("utf-8").splitlines()]
    assert texts == [
        {"label": "1f600", "name": "grinning face", "category": "Smileys & Emotion", "text": "grinning face d smiling"},
        {"label": "23-20e3", "name": "hash", "category": "Symbols", "text": "hash keycap"},
    ]


def test_a_damaged_package_is_removed_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = cache / "emoji-datasource-twitter-16.0.0.tgz"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(RuntimeError, match=r"damaged.*run the command again"):
        emoji.fetch(tmp_path / "out", cache=cache)
    assert not file.exists()
    assert not (tmp_path / "out").exists()


def test_without_npm_the_digits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no `npm` here.*--data digits"):
        emoji.fetch(tmp_path / "out", cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_an_unreachable_registry_gives_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    with pytest.raises(RuntimeError, match=r"could not fetch left-pad@1.3.0 \(.*127.0.0.1.*check the network.*digits"):
        download(["left-pad@1.3.0"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_npm_errors_are_told_in_one_line() -> None:
    stderr = "npm warn old lock\nnpm error code E404\nnpm error 404 Not Found\nnpm error A complete log of this run is there"
    assert explain(stderr) == "404 Not Found"
    assert explain("npm ERR! code X\nnpm ERR! network unreachable\n") == "network unreachable"
    assert explain("") == "no reason given"


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "nearfar"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "nearfar"


def test_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    summary = digits.fetch(tmp_path / "out")
    assert (summary.classes, summary.images) == (10, 1797)
    known = load_digits()
    pixels = np.asarray(Image.open(tmp_path / "out" / str(known.target[42]) / "0042.png"))
    assert pixels.shape == (32, 32)
    assert np.abs(pixels[::4, ::4] / 255 * 16 - known.images[42]).max() < 0.04
    with pytest.raises(ValueError, match="not empty"):
        digits.fetch(tmp_path / "out")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_is_read_from_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {prefix: rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for prefix, n in (("train", 20), ("t10k", 10))}
    for prefix, pixels in images.items():
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(len(pixels), dtype=np.uint8) % 10)
    summary = fashion_mnist.fetch(tmp_path / "out", source=tmp_path)
    assert (summary.classes, summary.images) == (10, 30)
    assert (np.asarray(Image.open(tmp_path / "out" / "ankle-boot" / "train-00019.png")) == images["train"][19]).all()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\0" * 20))
    with pytest.raises(ValueError, match="no IDX file"):
        fashion_mnist.fetch(tmp_path / "other", source=tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="no file"):
        fashion_mnist.fetch(tmp_path / "other", source=tmp_path)
    assert not (tmp_path / "other").exists()


def test_fashion_mnist_without_debian_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no apt-get here"):
        fashion_mnist.fetch(tmp_path / "out")


def test_every_data_set_can_be_resolved() -> None:
    assert all(callable(resolve("dataset", name)) for name in PARTS["dataset"])
