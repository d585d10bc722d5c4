"""Folders to shards, with everything people put into them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pipelines.pack as packing
from pipelines.decode import decode
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.records import Listing
from pipelines.sources.folder import list_folder

Painter = Callable[..., Image.Image]
MakeClasses = Callable[[Path, dict[str, int]], Path]


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_folder_lists_classes_by_their_first_level(tmp_path: Path, painter: Painter) -> None:
    root = tmp_path / "src"
    for place in ("Ärger & Co/a b.png", "Ärger & Co/deep.er/x.v2.PNG", "v1.0/ü.jpg", ".hidden/a.png", "v1.0/.hidden.png"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        painter(1).save(root / place)
    (root / "v1.0" / "notes.txt").write_text("no image")
    (root / "README").write_text("no class")
    (root / "empty").mkdir()
    listing = list_folder(root)
    assert [(record.entity, record.name) for record in listing.records] == [
        ("v1.0", "v1.0/ü.jpg"),
        ("Ärger & Co", "Ärger & Co/a b.png"),
        ("Ärger & Co", "Ärger & Co/deep.er/x.v2.PNG"),
    ]
    assert listing.ignored == 4
    assert listing.empty_classes == ("empty",)


def test_file_names_that_are_no_utf8_can_be_packed(tmp_path: Path, make_classes: MakeClasses) -> None:
    root = make_classes(tmp_path / "src", {"a": 2, "b": 2})
    (root / "a" / "im 0.png").rename(root / "a" / b"\xff\xfe.png".decode("utf-8", "surrogateescape"))
    pack(root, tmp_path / "out")
    manifest = Manifest.open(tmp_path / "out")
    assert "a/\\xff\\xfe.png" in manifest.sources(0)


@pytest.mark.parametrize(
    ("counts", "message"),
    [({}, "expected one folder per class"), ({"a": 0, "b": 0}, "2 folders"), ({"a": 3}, "only the class 'a'")],
)
def test_too_little_is_refused(tmp_path: Path, make_classes: MakeClasses, counts: dict[str, int], message: str) -> None:
    (tmp_path / "src").mkdir()
    make_classes(tmp_path / "src", counts)
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "src", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_missing_and_flat_folders_are_refused(tmp_path: Path, painter: Painter) -> None:
    with pytest.raises(ValueError, match="no folder"):
        pack(tmp_path / "nowhere", tmp_path / "out")
    painter(1).save(tmp_path / "flat.png")
    with pytest.raises(ValueError, match="one folder per class"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="neither a folder"):
        pack(tmp_path / "flat.png", tmp_path / "out")


def test_an_existing_output_is_not_touched(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        pack(folder, tmp_path / "out")
    assert files_of(tmp_path) == {"out/mine": b"precious"}
    (tmp_path / "out" / "mine").unlink()
    pack(folder, tmp_path / "out")
    Manifest.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pears"}, "unknown kind"),
        ({"kind": "pair"}, "give a table"),
        ({"eval_fraction": 1.0}, "eval-fraction"),
        ({"eval_fraction": 0.5, "split": "colour"}, "unknown split"),
        ({"max_shard_mb": 0}, "max-shard-mb"),
        ({"max_shard_records": 0}, "max-shard-records"),
        ({"quality": 80}, "give --max-side or --reencode"),
        ({"quality": 101, "reencode": True}, "from 1 to 100"),
        ({"workers": 0}, "workers"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(folder, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    pack(folder, tmp_path / "a", eval_fraction=0.4, seed=5)
    pack(folder, tmp_path / "b", eval_fraction=0.4, seed=5, workers=3)
    pack(folder, tmp_path / "c", eval_fraction=0.4, seed=6)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert files_of(tmp_path / "a") != files_of(tmp_path / "c")


def test_a_split_by_class_shares_no_class(tmp_path: Path, folder: Path) -> None:
    summary = pack(folder, tmp_path / "out", eval_fraction=0.3)
    train, held_out = Manifest.open(tmp_path / "out" / "train"), Manifest.open(tmp_path / "out" / "eval")
    assert (train.num_classes, held_out.num_classes) == (5, 2)
    assert not set(train.class_names) & set(held_out.class_names)
    assert train.num_samples + held_out.num_samples == summary.records == 56
    assert summary.sets["eval"].path == tmp_path / "out" / "eval"


def test_a_split_by_record_takes_a_share_of_every_class(tmp_path: Path, folder: Path) -> None:
    pack(folder, tmp_path / "out", eval_fraction=0.5, split="record")
    train, held_out = Manifest.open(tmp_path / "out" / "train"), Manifest.open(tmp_path / "out" / "eval")
    assert train.class_counts == held_out.class_counts
    assert not set(train.sources(0)) & set(held_out.sources(0))


def test_a_split_by_class_needs_two_classes_on_each_side(tmp_path: Path, make_classes: MakeClasses) -> None:
    root = make_classes(tmp_path / "src", {"a": 2, "b": 2, "c": 2})
    with pytest.raises(ValueError, match="3 classes cannot be split"):
        pack(root, tmp_path / "out", eval_fraction=0.3)


def make_mess(root: Path, painter: Painter) -> set[str]:
    """All that people have in their folders; returns the files that cannot be used."""
    for name in ("cat.v1", "dög s"):
        (root / name).mkdir(parents=True)
    good = {
        "cat.v1/grey.png": painter(1, mode="L"),
        "cat.v1/rgba.png": painter(2, mode="RGBA"),
        "cat.v1/cm yk.jpg": painter(3, mode="CMYK"),
        "cat.v1/palette.gif": painter(4).quantize(16),
        "dög s/ü.webp": painter(5),
        "dög s/tall.bmp": painter(6, (7, 90)),
        "dög s/turned.jpeg": painter(7),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image in good.items():
        image.save(root / name, **({"exif": exif} if "turned" in name else {}))
    jpeg = (root / "dög s/turned.jpeg").read_bytes()
    bad = {
        "cat.v1/cut.jpg": jpeg[: len(jpeg) // 2],
        "cat.v1/cut.png": png(painter(8))[:-500],
        "dög s/zero.png": b"",
        "dög s/text.jpg": b"I am a text",
    }
    for name, data in bad.items():
        (root / name).write_bytes(data)
    return set(bad)


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_images_are_listed_and_the_rest_is_packed(tmp_path: Path, painter: Painter, workers: int) -> None:
    bad = make_mess(tmp_path / "src", painter)
    told: list[tuple[int, int | None]] = []
    summary = pack(tmp_path / "src", tmp_path / "out", workers=workers, progress=lambda done, total: told.append((done, total)))
    assert {image for image, _ in summary.rejected} == bad
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [(line["image"], line["reason"]) for line in lines] == summary.rejected
    assert summary.records == 7
    assert (told[0], told[-1]) == ((0, 11), (11, 11))
    assert sum(summary.left_out.values()) == 4
    manifest = Manifest.open(tmp_path / "out")
    table, sizes = manifest.table(0), {}
    data = manifest.shard_path(0).read_bytes()
    for i, source in enumerate(manifest.sources(0)):
        pixels = decode(data[table.offset[i] : table.offset[i] + table.size[i]])
        assert pixels.shape[:2] == (table.height[i], table.width[i])
        sizes[source] = (int(table.width[i]), int(table.height[i]))
    assert sizes["dög s/turned.jpeg"] == (32, 40)


def test_classes_of_one_image_are_counted(tmp_path: Path, make_classes: MakeClasses) -> None:
    root = make_classes(tmp_path / "src", {"a": 1, "b": 1, "c": 3})
    assert pack(root, tmp_path / "out").sets["all"].single_image_classes == 2


def test_nothing_readable_leaves_nothing_behind(tmp_path: Path, make_classes: MakeClasses) -> None:
    root = make_classes(tmp_path / "src", {"a": 2, "b": 2})
    for path in (root / "b").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"only the class 'a'.*2 images could not be read"):
        pack(root, tmp_path / "out")
    for path in (root / "a").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no readable image.*not an image"):
        pack(root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_needed_bytes_are_known(folder: Path) -> None:
    listing = packing.list_source(folder, "labelled")
    assert isinstance(listing, Listing)
    assert listing.nbytes == sum(path.stat().st_size for path in folder.rglob("*.png"))
