"""Folders and tables to shards, with everything people put into them."""

from __future__ import annotations

import errno
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset as wds
from PIL import Image

import pipelines.pack as packing
from pipelines.decode import decode
from pipelines.hashing import hash_bytes, hash_entity
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.records import MEMBERS, Listing, LocalFile, Record, make_key, member_groups
from pipelines.sources.folder import list_folder
from pipelines.sources.table import list_table

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


def test_stock_webdataset_reads_the_shards(labelled: Manifest, folder: Path) -> None:
    seen = {}
    for shard in range(len(labelled.sizes)):
        for sample in wds.WebDataset(str(labelled.shard_path(shard)), shardshuffle=False, empty_check=False).decode("pil"):
            assert set(sample) - {"__key__", "__url__", "__local_path__"} == {"png", "cls"}
            seen[sample["__key__"]] = (np.asarray(sample["png"]), sample["cls"])
    names = sorted({path.parent.name for path in folder.rglob("*.png")})
    keys = [key for shard in range(len(labelled.sizes)) for key in labelled.keys(shard)]
    sources = [source for shard in range(len(labelled.sizes)) for source in labelled.sources(shard)]
    assert len(seen) == len(keys) == 56
    for key, source in zip(keys, sources, strict=True):
        pixels, label = seen[key]
        assert (pixels == np.asarray(Image.open(folder / source))).all()
        assert names[label] == Path(source).parent.name


def test_the_manifest_tells_where_every_image_lies(many_shards: Manifest, folder: Path) -> None:
    assert len(many_shards.sizes) > 5
    assert many_shards.starts.tolist() == [0, *np.cumsum(many_shards.sizes).tolist()]
    for shard in range(len(many_shards.sizes)):
        table = many_shards.table(shard)
        data = many_shards.shard_path(shard).read_bytes()
        assert len(data) == many_shards.nbytes[shard]
        with tarfile.open(many_shards.shard_path(shard)) as tar:
            members = {member.offset_data: member for member in tar if member.name.endswith(".png")}
        assert sorted(members) == sorted(table.offset.tolist())
        for i, source in enumerate(many_shards.sources(shard)):
            found = data[table.offset[i] : table.offset[i] + table.size[i]]
            assert found == (folder / source).read_bytes()
            assert members[table.offset[i]].name.startswith(many_shards.keys(shard)[i] + ".")
            assert (table.uid[i], table.crc32[i]) == (hash_bytes(found), zlib.crc32(found))
            assert table.group[i] == hash_entity(Path(source).parent.name)
            assert (table.width[i], table.height[i], table.view[i]) == (40, 32, 0)


def test_runs_hold_one_class_and_are_shuffled(many_shards: Manifest, labelled: Manifest) -> None:
    for manifest in (many_shards, labelled):
        runs = manifest.runs
        assert runs.length.max() <= 10  # two runs of 5 may come to stand side by side
        assert runs.length.sum() == manifest.num_samples
        for shard, start, length in zip(runs.shard, runs.start, runs.length, strict=True):
            assert len(set(manifest.table(int(shard)).group[start : start + length].tolist())) == 1
    first = [labelled.class_names[int(labelled.table(0).group[start])] for start in labelled.runs.start]
    assert first != sorted(first)


def test_class_names_and_counts_are_kept(labelled: Manifest) -> None:
    counts = {labelled.class_names[group]: count for group, count in labelled.class_counts.items()}
    assert counts == {f"klasse {i}": 2 * (i + 1) for i in range(7)}
    assert labelled.num_classes == 7


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
    assert told == [(i + 1, 11) for i in range(11)]
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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interruption_and_a_full_disk_leave_nothing_behind(tmp_path: Path, folder: Path, error: BaseException) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done == 30:
            raise error

    expected = RuntimeError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="no space left.*MB are needed" if isinstance(error, OSError) else None):
        pack(folder, tmp_path / "out", workers=2, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_shards_stay_below_the_size_asked_for(tmp_path: Path, painter: Painter) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(4):
            noise = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
            noise.save(tmp_path / "src" / name / f"{i}.png")
    pack(tmp_path / "src", tmp_path / "out", max_shard_mb=1)
    manifest = Manifest.open(tmp_path / "out")
    assert manifest.sizes.tolist() == [2, 2, 2, 2]
    assert manifest.nbytes.max() <= 2**20 + 10240  # tar fills up its last record


def write_table(path: Path, columns: dict[str, list[Any]]) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        path.write_text("".join(",".join("" if v is None else str(v) for v in row) + "\n" for row in rows), "utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), "utf-8")
    return path


@pytest.fixture
def pictures(tmp_path: Path, painter: Painter) -> list[str]:
    (tmp_path / "im").mkdir()
    for i in range(8):
        painter(i).save(tmp_path / "im" / f"p {i}.png")
    return [f"im/p {i}.png" for i in range(8)]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_tables_of_every_kind_and_format_are_packed(tmp_path: Path, pictures: list[str], suffix: str) -> None:
    columns: dict[str, dict[str, list[Any]]] = {
        "labelled": {"image": pictures[:4], "label": ["007", "b", "007", "b"]},
        "pair": {"anchor": pictures[:2], "positive": pictures[2:4], "group": ["g", "h"]},
        "labelled_pair": {"left": pictures[:2], "right": pictures[2:4], "match": [1, 0]},
        "triplet": {
            "anchor": pictures[:2],
            "positive": pictures[2:4],
            "negative0": pictures[4:6],
            "negative1": [pictures[6], None],
            "weight": [0.5, 2.0],
        },
    }
    for kind, values in columns.items():
        path = write_table(tmp_path / f"{kind}{suffix}", values)
        summary = pack(path, tmp_path / kind, kind=kind)
        assert not summary.rejected
        manifest = Manifest.open(tmp_path / kind)
        table = manifest.table(0)
        number = {hash_bytes((tmp_path / name).read_bytes()): i for i, name in enumerate(pictures)}
        rows = {
            tuple(number[uid] for uid in table.uid[table.start[i] : table.start[i + 1]].tolist()): i
            for i in range(manifest.num_samples)
        }
        if kind == "labelled":
            assert sorted(manifest.class_counts.values()) == [2, 2]
            assert set(manifest.class_names.values()) == {"007", "b"}
        elif kind == "pair":
            assert set(rows) == {(0, 2), (1, 3)}
            assert set(table.group.tolist()) == {hash_entity("g"), hash_entity("h")}
        elif kind == "labelled_pair":
            assert {members: int(table.match[i]) for members, i in rows.items()} == {(0, 2): 1, (1, 3): 0}
            same = {members: len(set(table.group[2 * i : 2 * i + 2].tolist())) == 1 for members, i in rows.items()}
            assert same == {(0, 2): True, (1, 3): False}
        else:
            assert {members: float(table.weight[i]) for members, i in rows.items()} == {(0, 2, 4, 6): 0.5, (1, 3, 5): 2.0}
            assert len(set(table.group.tolist())) == 2 + 3
            assert manifest.weighted
        with tarfile.open(manifest.shard_path(0)) as tar:
            names = tar.getnames()
        assert {name.partition(".")[2].partition(".")[0] for name in names} >= set(MEMBERS[kind]) - {""}


def test_image_bytes_in_parquet_are_packed(tmp_path: Path, pictures: list[str]) -> None:
    data = [(tmp_path / name).read_bytes() for name in pictures[:4]]
    for name, column in {"bytes": data, "struct": [{"bytes": one, "path": None} for one in data]}.items():
        path = write_table(tmp_path / f"{name}.parquet", {"image": column, "label": [1, 2, 1, 2]})
        assert pack(path, tmp_path / name).records == 4
        assert set(Manifest.open(tmp_path / name).class_names.values()) == {"1", "2"}


def test_missing_files_of_a_table_are_listed(tmp_path: Path, pictures: list[str]) -> None:
    columns = {"anchor": pictures[:3], "positive": [*pictures[3:5], "im/gone.png"]}
    summary = pack(write_table(tmp_path / "t.csv", columns), tmp_path / "out", kind="pair")
    assert summary.rejected == [("im/gone.png", "no such file")]
    assert summary.records == 2


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("pair", {"anchor": ["a"]}, "has no column positive"),
        ("triplet", {"anchor": ["a"], "positive": ["b"]}, "has no column negative"),
        ("labelled_pair", {"left": ["a"], "right": ["b"], "match": ["maybe"]}, "row 0: match must be 0 or 1"),
        ("labelled", {"image": ["a", None], "label": ["x", "y"]}, "row 1: no image"),
        ("labelled", {"image": ["a", "b"], "label": ["x", None]}, "row 1: no label"),
        ("labelled", {"image": [1, 2], "label": ["x", "y"]}, "must hold paths or image bytes"),
        ("pair", {"anchor": ["a"], "positive": ["b"], "weight": [-1.0]}, "weight must be a number"),
    ],
)
def test_tables_that_say_too_little_are_refused(tmp_path: Path, kind: str, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_table(write_table(tmp_path / "t.parquet", columns), kind)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    for name in ("t.parquet", "t.jsonl", "t.csv"):
        (tmp_path / name).write_bytes(b"\0\1\2 nonsense")
        with pytest.raises(ValueError, match=r"cannot be read|has no column"):
            list_table(tmp_path / name, "pair")
    with pytest.raises(ValueError, match="no file"):
        list_table(tmp_path / "none.csv", "pair")


def test_groups_follow_the_kind() -> None:
    images = tuple(LocalFile(Path(f"{i}.png"), f"{i}.png") for i in range(4))
    assert len(set(member_groups("triplet", Record(images), "k"))) == 3
    known = Record(images, entity="cat", negative_entities=("dog", "cat"))
    assert member_groups("triplet", known, "k") == [hash_entity(name) for name in ("cat", "cat", "dog", "cat")]
    assert member_groups("pair", Record(images[:2]), "k") != member_groups("pair", Record(images[:2]), "l")


def test_keys_are_plain_and_short() -> None:
    assert make_key(3, "dög s/ü b.v1.png") == "0000000003-u-b-v1"
    assert make_key(4, "日本.png") == "0000000004"
    assert len(make_key(10**9, "x" * 300 + ".png")) <= 64


def test_a_manifest_that_is_not_right_is_refused(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    pack(folder, out, eval_fraction=0.3)
    with pytest.raises(ValueError, match=r"did you mean .*eval or .*train"):
        Manifest.open(out)
    with pytest.raises(ValueError, match="no folder"):
        Manifest.open(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no shards"):
        Manifest.open(folder)
    file = out / "train" / "manifest.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "digest": "0" * 64}))
    with pytest.raises(ValueError, match="does not match its digest"):
        Manifest.open(out / "train")
    file.write_text(json.dumps({**about, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        Manifest.open(out / "train")
    file.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Manifest.open(out / "train")


def test_needed_bytes_are_known(folder: Path) -> None:
    listing = packing.list_source(folder, "labelled")
    assert isinstance(listing, Listing)
    assert listing.nbytes == sum(path.stat().st_size for path in folder.rglob("*.png"))
