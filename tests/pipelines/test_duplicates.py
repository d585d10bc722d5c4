"""Copies among real data sets: found when they were changed, and not seen where there are none."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.decode import Pixels, decode
from pipelines.duplicates import KINDS, across_classes, lookalikes, same_files
from pipelines.fingerprints import Images, Prints, file_of, images_of, names_of, prints_of
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.parallel import process_map
from pipelines.phash import fingerprint
from tests.benchmarks.measure import table
from tests.pipelines.conftest import fill_classes, paint


def encoded(image: Image.Image, format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float) -> Image.Image:
    x, y = max(1, round(image.width * share)), max(1, round(image.height * share))
    return image.crop((x, y, image.width - x, image.height - y))


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "PNG again": lambda image: encoded(image, "PNG", compress_level=1),
    "JPEG, quality 70": lambda image: encoded(image, "JPEG", quality=70),
    "0.7 of the size": lambda image: encoded(scaled(image, 0.7), "PNG"),
    "half the size, JPEG": lambda image: encoded(scaled(image, 0.5), "JPEG", quality=80),
    "mirrored, JPEG": lambda image: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "JPEG", quality=85),
    "1 % cut off each side": lambda image: encoded(cropped(image, 0.01), "PNG"),
    "3 % cut off each side": lambda image: encoded(cropped(image, 0.03), "PNG"),
}


def prints(images: list[Pixels]) -> Prints:
    """Fingerprints of images that lie in no data set."""
    found = [fingerprint(pixels) for pixels in images]
    rows = np.arange(len(found))
    return Prints(
        Images(rows, rows, np.zeros_like(rows), rows),
        np.asarray([one.pixels for one in found]),
        np.asarray([one.hash for one in found], np.uint64),
        np.asarray([one.mirrored for one in found], np.uint64),
        np.stack([one.thumb for one in found]),
        np.asarray([one.flat for one in found]),
    )


def changed(images: list[Pixels], change: Callable[[Image.Image], bytes]) -> Prints:
    return prints([decode(change(Image.fromarray(pixels))) for pixels in images])


def test_changed_copies_are_found_and_other_images_are_not() -> None:
    images = [np.asarray(paint(seed, (90 + seed, 120))) for seed in range(40)]
    there, strangers = prints(images[:30]), prints(images[30:])
    assert len(lookalikes(strangers, there).ours) == 0
    for name in list(CHANGES)[:5]:
        found = lookalikes(changed(images[:30], CHANGES[name]), there)
        assert found.theirs.tolist() == found.ours.tolist() == list(range(30)), name
        assert {KINDS[kind] for kind in found.kind} == ({"same"} if name == "PNG again" else {"near"}), name
    found = lookalikes(changed(images[:30], CHANGES["1 % cut off each side"]), there)
    assert len(found.ours) >= 25
    assert (found.ours == found.theirs).all()


def test_blank_images_are_alike_only_when_their_pixels_are() -> None:
    blank = [np.full((30, 30, 3), grey, np.uint8) for grey in (0, 255, 254, 255)]
    found = lookalikes(prints(blank[:3]), prints(blank[3:]))
    assert (found.ours.tolist(), found.theirs.tolist(), found.counts()["same"]) == ([1], [0], 1)


def test_the_same_file_in_two_sets_is_known_from_their_manifests(tmp_path: Path) -> None:
    ours, theirs = fill_classes(tmp_path / "a", {"x": 3, "y": 3}), fill_classes(tmp_path / "b", {"v": 2, "w": 6})
    for path in theirs.rglob("*.png"):  # the same images under other names, but for two
        path.rename(path.with_name(f"other {path.name}"))
    paint(100).save(theirs / "v" / "other im 0.png")
    sets = []
    for source, out in ((ours, "p"), (theirs, "q")):
        pack(source, tmp_path / out)
        sets.append(Manifest.open(tmp_path / out))
    images, others = images_of(sets[0]), images_of(sets[1])
    found = same_files(images, others)
    assert len(found.ours) == 5
    assert images.uid[found.ours].tolist() == others.uid[found.theirs].tolist()
    files = [file_of(sets[0], images, row) for row in found.ours], [file_of(sets[1], others, row) for row in found.theirs]
    assert files[0] == files[1]
    assert None not in files[0]


def test_copies_in_two_classes_are_told_once_each_and_those_in_one_class_never(tmp_path: Path) -> None:
    source = fill_classes(tmp_path / "images", {"a": 4, "b": 4})
    first = (source / "a" / "im 0.png").read_bytes()
    (source / "a" / "again.png").write_bytes(first)
    (source / "b" / "wrong.png").write_bytes(first)
    (source / "b" / "broken.png").write_bytes(b"")
    Image.open(source / "a" / "im 1.png").save(source / "b" / "near.jpg", quality=70)
    pack(source, tmp_path / "shards")
    manifest = Manifest.open(tmp_path / "shards")
    found, unreadable = prints_of(manifest)
    again, _ = prints_of(manifest, map=process_map(2))
    assert (found.hash == again.hash).all()
    assert unreadable == 0  # it was never packed
    allowed = across_classes(found.images)
    matches = same_files(found.images, found.images, allowed).or_else(lookalikes(found, found, allowed))
    names, others = (names_of(manifest, found.images, rows) for rows in (matches.ours, matches.theirs))
    pairs = {frozenset(name.partition("-")[2] for name in pair) for pair in zip(names, others, strict=True)}
    assert frozenset(("near", "im-1")) in pairs
    assert {"wrong"} & {name for pair in pairs for name in pair}
    assert not any(pair <= {"again", "im-0"} for pair in pairs)
    assert matches.counts()["near"] == 1


@pytest.mark.acceptance
def test_copies_of_emoji_are_found_and_emoji_by_another_hand_are_not(emoji_shards: Path) -> None:
    """Recall by what was done to a copy; false alarms among drawings by hands that the gallery does not have."""
    rng = random.Random(0)
    folders = sorted(path for path in (emoji_shards.parent / "images").iterdir() if path.is_dir())
    hands: dict[str, list[Pixels]] = {"noto": [], "twemoji": [], "fluent": []}
    for folder in folders:
        for file in folder.iterdir():
            if file.stem in hands:
                hands[file.stem].append(decode(file.read_bytes()))
    there = prints([*hands["noto"], *hands["twemoji"]])
    strangers = prints(hands["fluent"])
    alarms = len(lookalikes(strangers, there).ours)
    picked = rng.sample(range(len(there.pixels)), 500)
    everything = [*hands["noto"], *hands["twemoji"]]
    rows, recall = [], {}
    for name, change in CHANGES.items():
        found = lookalikes(changed([everything[i] for i in picked], change), there)
        recall[name] = len(found.ours) / len(picked)
        precision = len(found.ours) / max(1, len(found.ours) + alarms * len(picked) / len(strangers.pixels))
        own = np.mean([there.pixels[b] == there.pixels[picked[a]] for a, b in zip(found.ours, found.theirs, strict=True)])
        rows.append([name, f"{recall[name]:.3f}", f"{precision:.4f}", f"{own:.3f}"])
    title = f"{len(picked)} copies among {len(there.pixels)} emoji; {alarms} of {len(strangers.pixels)} by another hand found"
    table(title, ["copy", "recall", "precision, as many strangers", "of these the very one"], rows)
    assert alarms <= 0.002 * len(strangers.pixels)
    for name, least in zip(CHANGES, (1.0, 0.88, 0.95, 0.7, 0.9), strict=False):
        assert recall[name] >= least, name
