"""The same emoji as drawn by four hands: classes are emoji, images are drawing styles."""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.folders import require_free
from pipelines.sources.fetched import ClassImage, FetchSummary, Licence, Progress, write_images
from pipelines.sources.npm import download

_SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
_INVISIBLE = frozenset({"fe0f", "200d", "e007f"})  # variation selector, joiner, end of a flag's tag


@dataclass(frozen=True, slots=True)
class Style:
    """One hand: a package of the npm registry and the folder of its images."""

    name: str
    package: str
    folder: str
    licence: str


STYLES = (
    Style("noto", "emoji-datasource-google@16.0.0", "package/img/google/64", "Noto Emoji by Google: Apache-2.0"),
    Style("blob", "emoji-datasource-google@3.0.0", "package/img/google/64", "Android Emoji by Google: Apache-2.0"),
    Style("twemoji", "emoji-datasource-twitter@16.0.0", "package/img/twitter/64", "Twemoji by Twitter, jdecked: CC BY 4.0"),
    Style("fluent", "@lobehub/fluent-emoji-3d@1.1.0", "package/assets", "Fluent Emoji by Microsoft: MIT"),
)
NAMES, KEYWORDS = STYLES[0].package, "emojilib@4.0.2"
TEXTS = "texts.jsonl"
LICENCES = (
    *(
        Licence(f"`{style.name}.*`", f"`{style.folder}` of the npm package `{style.package}` (MIT)", style.licence)
        for style in STYLES
    ),
    Licence(f"`{TEXTS}`", f"names of the npm package `{NAMES}`, keywords of `{KEYWORDS}`", "MIT"),
)


def fetch(out: Path, *, cache: Path | None = None, progress: Progress | None = None) -> FetchSummary:
    """Write OUT/<code points>/<style>.png or .webp, bytes as published; skin tones are left out.

    OUT/texts.jsonl has the name, category and keywords of every emoji. The packages (about 180 MB) are kept in `cache`.
    `progress` counts packages first, then images.
    Raises ValueError when `out` holds something already, RuntimeError without npm, network or disk space.
    """
    require_free(out)
    *tarballs, keywords = download([*(style.package for style in STYLES), KEYWORDS], cache, progress)
    images = [image for style, tarball in zip(STYLES, tarballs, strict=True) for image in read_style(style, tarball)]
    images.sort(key=lambda image: (image.entity, image.name))
    texts = read_texts(tarballs[0], keywords)
    lines = [json.dumps({"label": entity, **texts[entity]}) for entity in sorted({image.entity for image in images} & {*texts})]
    return write_images(
        out, images, LICENCES, title="emoji", total=len(images), progress=progress, beside={TEXTS: "\n".join(lines) + "\n"}
    )


def read_style(style: Style, tarball: Path) -> Iterator[ClassImage]:
    """The images of one style, one a class. A damaged tarball is removed, so that the next attempt fetches it again."""
    found: dict[str, tuple[str, bytes]] = {}
    try:
        with tarfile.open(tarball, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                entity = class_of(path.stem)
                if entity is None or not member.isfile() or str(path.parent) != style.folder:
                    continue
                if path.suffix not in (".png", ".webp") or (entity in found and found[entity][0] <= path.name):
                    continue
                file = tar.extractfile(member)
                assert file is not None
                found[entity] = (path.name, file.read())
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        tarball.unlink(missing_ok=True)
        raise RuntimeError(f"{str(tarball)!r} was damaged ({error}) and is removed: run the command again") from error
    for entity, (name, data) in found.items():
        yield ClassImage(entity, f"{style.name}{PurePosixPath(name).suffix}", data)


def read_texts(names: Path, keywords: Path) -> dict[str, dict[str, str]]:
    """Name, category and text (name, short names, keywords, sub-category) of the emoji in two packages, by class."""
    words: dict[str, list[str]] = {}
    for character, found in _member(keywords, "package/dist/emoji-en-US.json").items():
        entity = class_of("-".join(f"{ord(point):x}" for point in character))
        if entity is not None:
            words.setdefault(entity, found)
    texts = {}
    for about in _member(names, "package/emoji.json"):
        entity = class_of(about["unified"])
        if entity is None:
            continue
        parts = [about["name"] or "", *about["short_names"], *words.get(entity, []), about["subcategory"]]
        text = " ".join(dict.fromkeys(re.findall(r"[a-z0-9]+", " ".join(parts).lower())))
        texts[entity] = {"name": (about["name"] or about["short_name"]).lower(), "category": about["category"], "text": text}
    return texts


def _member(tarball: Path, name: str) -> Any:
    try:
        with tarfile.open(tarball, "r:gz") as tar:
            file = tar.extractfile(name)
            assert file is not None
            return json.load(file)
    except (tarfile.TarError, EOFError, zlib.error, OSError, KeyError, ValueError) as error:
        tarball.unlink(missing_ok=True)
        raise RuntimeError(f"{str(tarball)!r} was damaged ({error}) and is removed: run the command again") from error


def class_of(stem: str) -> str | None:
    """Code points without what does not show: `0023-fe0f-20e3` is `23-20e3`. None for skin tones and for other files."""
    points = re.split("[-_]", stem.lower())
    if not all(re.fullmatch("[0-9a-f]+", point) for point in points) or _SKIN_TONES & set(points):
        return None
    return "-".join(point.lstrip("0") for point in points if point not in _INVISIBLE) or None
