"""What `nearfar inspect` tells a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipelines.inspect import Contents
from pipelines.tar import printable


def describe(contents: Contents) -> str:
    """A line for each thing, with its name in front."""
    return "\n".join(f"{name:10} {text}" for name, text in _lines(contents))


def _lines(contents: Contents) -> Iterator[tuple[str, str]]:
    twice = contents.images - contents.distinct_images
    bad = f", {contents.bad} of them bad" if contents.bad else ""
    shards = contents.shards
    yield "data", f"{contents.path} ({contents.kind}, made by {contents.made_by}, digest {contents.digest[:12]})"
    yield "records", f"{contents.records}{bad}"
    yield "images", f"{contents.images}" + (f", {twice} of them copies of others" if twice else "")
    if contents.vectors:
        yield "vectors", f"{contents.vectors} of {contents.vector_dim} numbers, in place of images"
    if contents.targets:
        yield "targets", f"{contents.targets} of {contents.target_dim} numbers"
    yield (
        "shards",
        f"{shards['count']} of {_megabytes(shards['smallest_bytes'])} to {_megabytes(shards['largest_bytes'])}, "
        f"{_megabytes(contents.nbytes)} in all, {shards['mean_records']} records each",
    )
    for name, quantiles in contents.quantiles.items():
        yield name, _quantiles(quantiles)
    yield "formats", ", ".join(f"{name} {share:.1%}" for name, share in contents.formats.items()) + " (of a sample)"
    if contents.classes:
        yield from _class_lines(contents)
    if contents.groups:
        yield "groups", f"{contents.groups['groups']}, the largest of {contents.groups['records_in_the_largest']} records"
    if contents.negatives:
        yield "negatives", ", ".join(f"{count}: {records} records" for count, records in contents.negatives.items())
    if contents.matches is not None:
        yield "match", f"{contents.matches} of {contents.records}"
    yield "weights", _quantiles(contents.weights) if contents.weights else "all 1"


def _class_lines(contents: Contents) -> Iterator[tuple[str, str]]:
    classes = contents.classes
    yield "classes", f"{classes['count']}, {classes['singles']} of them of a single image"
    yield "", f"images in a class: {_quantiles(classes['images_per_class'])}"
    yield "", f"largest: {_counts(classes['largest'])}"
    yield "", f"smallest: {_counts(classes['smallest'])}"
    yield "", f"longest run: {classes['longest_run']} images (data.per_class can be at most this)"


def _quantiles(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _counts(classes: Mapping[str, int]) -> str:
    return ", ".join(f"{printable(name)} {count}" for name, count in classes.items())


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MB"
