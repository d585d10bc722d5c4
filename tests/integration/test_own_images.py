"""A folder of whatever people have: the README's two commands, nothing more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.manifest import Manifest
from tests.conftest import Answer

Nearfar = Callable[..., Answer]


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of two photographs in nine classes of eight, saved in every way, four of them broken."""
    folder = tmp_path_factory.mktemp("own") / "my images"
    photos = load_sample_images().images
    generator = np.random.default_rng(0)
    names = ["a b", "größe", "v1.2.3", "写真", "d-d", "e_e", "UPPER", "h'h", "100%"]
    for c, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            y, x = generator.integers(0, 200, 2)
            image = Image.fromarray(photos[c % 2][y + 10 * c : y + 10 * c + 120, x : x + 160])
            _save(image, folder / name / f"photo {i}.v{c}", i)
    broken = folder / "a b"
    data = (folder / "größe" / "photo 0.v1.jpg").read_bytes()
    (broken / "cut short.jpg").write_bytes(data[: len(data) // 2])
    (broken / "empty.png").write_bytes(b"")
    (broken / "page.jpeg").write_bytes(b"<html>not found</html>")
    (broken / "half.png").write_bytes((folder / "größe" / "photo 2.v1.png").read_bytes()[:900])
    (broken / "notes.txt").write_text("no image")
    (broken / ".hidden.jpg").write_bytes(data)
    return folder


def _save(image: Image.Image, path: Path, how: int) -> None:
    match how:
        case 0:
            image.save(f"{path}.jpg", quality=90)
        case 1:
            image.convert("L").save(f"{path}.JPEG")
        case 2:
            image.convert("RGBA").save(f"{path}.png")
        case 3:
            image.convert("CMYK").save(f"{path}.jpeg")
        case 4:
            exif = Image.Exif()
            exif[0x0112] = 6
            image.rotate(90, expand=True).save(f"{path}.jpg", exif=exif)
        case 5:
            image.quantize(64).save(f"{path}.png")
        case 6:
            image.save(f"{path}.webp", lossless=True)
        case _:
            image.convert("L").save(f"{path}.png")


def test_bad_images_are_listed_and_the_rest_train(nearfar: Nearfar, messy: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    packed = nearfar("pack", messy, shards, "--eval-fraction", "0.25", "--json")
    assert packed.code == 0, packed.err
    summary = json.loads(packed.out)
    assert sorted(Path(path).name for path, _ in summary["rejected"]) == ["cut short.jpg", "empty.png", "half.png", "page.jpeg"]
    listed = [json.loads(line) for line in (shards / "rejected.jsonl").read_text().splitlines()]
    assert len(listed) == 4
    assert sum(part["records"] for part in summary["sets"].values()) == 72
    recipe = nearfar("recipes", "emoji").out.replace("shards/emoji", str(shards)).replace("emoji", "mine")
    (tmp_path / "mine.yaml").write_text(recipe)
    small = ["data.batch=16", "train.steps=6", "optim.warmup_steps=2", "encoder.widths=[16,32]", "cluster.workers=1"]
    settings = [part for setting in [*small, f"cluster.storage={tmp_path}/runs"] for part in ("--set", setting)]
    trained = nearfar("train", tmp_path / "mine.yaml", "--local", "--json", *settings)
    assert trained.code == 0, trained.err
    result = json.loads(trained.out)
    assert result["model"] == "models:/mine@champion"
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert all(escape(name) in page for name in Manifest.open(shards / "eval").classes.names)
    assert not (tmp_path / "runs" / "mine" / "quarantine.jsonl").exists()


@pytest.mark.parametrize("kind", ["pair", "labelled_pair", "triplet"])
def test_tables_of_pairs_and_triplets_train(nearfar: Nearfar, messy: Path, tmp_path: Path, kind: str) -> None:
    columns = {"pair": ["anchor", "positive"], "labelled_pair": ["left", "right", "match"]}.get(
        kind, ["anchor", "positive", "negative0", "negative1"]
    )
    rows = [",".join(columns)]
    for c, folder in enumerate(sorted(p for p in messy.iterdir() if p.is_dir())):
        good = sorted(p for p in folder.iterdir() if p.name.startswith("photo"))
        other = sorted(messy.glob("*/photo*"))[(c * 31) % 72]
        for i in range(4):
            cells = [str(p.relative_to(messy)) for p in (good[2 * i], good[2 * i + 1], other, other)][: len(columns)]
            if kind == "labelled_pair":
                cells[2] = str(i % 2)
            if kind == "triplet" and i % 2:
                cells[3] = ""  # ragged: not every triplet has as many negatives
            rows.append(",".join(f'"{cell}"' for cell in cells))
    (messy / f"{kind}.csv").write_text("\n".join(rows))
    packed = nearfar(
        "pack", messy / f"{kind}.csv", tmp_path / "shards", "--kind", kind, "--eval-fraction", "0.25", "--split", "record"
    )
    assert packed.code == 0, packed.err
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: {kind}\ndata: {{train: {tmp_path}/shards/train, eval: {tmp_path}/shards/eval, image_size: 32, batch: 8}}\n"
        f"encoder: {{name: convnet, dim: 16, widths: [8], blocks: 1}}\ntrain: {{steps: 4, log_every: 1}}\n"
        f"cluster: {{workers: 2, storage: {tmp_path}/runs}}\ntracking: {{enabled: false}}\n"
    )
    trained = nearfar("train", config, "--local", "--json")
    assert trained.code == 0, trained.err
    result = json.loads(trained.out)
    assert result["status"] == "FINISHED"
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "Given as the same thing, and least alike." in page
    assert ("Given as different, and most alike." in page) == (kind != "pair")
