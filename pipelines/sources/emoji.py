"""The same emoji as drawn by four hands: classes are emoji, images are drawing styles."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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
LICENCES = tuple(
    Licence(f"`{style.name}.*`", f"`{style.folder}` of the npm package `{style.package}` (MIT)", style.licence)
    for style in STYLES
)


def fetch(out: Path, *, cache: Path | None = None, progress: Progress | None = None) -> FetchSummary:
    """Write OUT/<code points>/<style>.png or .webp, bytes as published; skin tones are left out.

    The packages (about 180 MB) are kept in `cache`. `progress` counts packages first, then images.
    Raises ValueError when `out` holds something already, RuntimeError without npm, network or disk space.
    """
    require_free(out)
    tarballs = download([style.package for style in STYLES], cache, progress)
    images = [image for style, tarball in zip(STYLES, tarballs, strict=True) for image in read_style(style, tarball)]
    images.sort(key=lambda image: (image.entity, image.name))
    return write_images(out, images, LICENCES, title="emoji", total=len(images), progress=progress)


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


def class_of(stem: str) -> str | None:
    """Code points without what does not show: `0023-fe0f-20e3` is `23-20e3`. None for skin tones and for other files."""
    points = re.split("[-_]", stem.lower())
    if not all(re.fullmatch("[0-9a-f]+", point) for point in points) or _SKIN_TONES & set(points):
        return None
    return "-".join(point.lstrip("0") for point in points if point not in _INVISIBLE) or None
