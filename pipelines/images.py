"""Opens images to embed, wherever they lie: in shards, in a folder, or named by a table."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.image_set import ImageSet
from pipelines.listed_images import ListedImages
from pipelines.manifest import Manifest
from pipelines.remote import is_url
from pipelines.shard_images import ShardImages
from pipelines.sources.folder import list_loose_folder, list_remote_folder
from pipelines.sources.table import is_table, kind_of_table, list_table
from pipelines.tar_urls import is_tars


def open_images(source: str, *, cache: str | None = None) -> ImageSet:
    """The images in shards, in a folder (by class or not), or in a table; each a path or a URL.

    Raises ValueError when it is none of these or holds no image, RuntimeError when a store does not answer.
    """
    if not is_url(source):
        source = str(Path(source).expanduser().absolute())
    if is_table(source) and not os.path.isdir(source):
        kind = kind_of_table(source)
        return ListedImages(source, kind, list_table(source, kind, images_only=True))
    if _holds_shards(source):
        return ShardImages(source, cache)
    if is_tars(source):
        raise ValueError(f"{source!r} is tars without a manifest; make one with `nearfar index`, then give its folder")
    if is_url(source):
        return ListedImages(source, "labelled", list_remote_folder(source))
    return ListedImages(source, "labelled", list_loose_folder(Path(source)))


def _holds_shards(source: str) -> bool:
    if not is_url(source):
        inner = [source, *(entry.path for entry in os.scandir(source) if entry.is_dir())] if os.path.isdir(source) else []
        return any(os.path.isfile(os.path.join(folder, "manifest.json")) for folder in inner)
    try:
        Manifest.open(source)
    except ValueError as error:
        if "no manifest.json" in str(error):
            return False
        raise
    return True
