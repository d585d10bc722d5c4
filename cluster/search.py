"""`nearfar search`: which images of an embeddings file are nearest to some image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cluster.embeddings import Embeddings, Row
from cluster.models import Model, open_model
from cluster.nearest import Vectors, nearest
from cluster.weights import weights_digest
from configs.schema import Augment
from pipelines.batch import NUM_DRAWS
from pipelines.crop import cut
from pipelines.hashing import Int64s
from pipelines.image_set import ImageSet
from pipelines.images import open_images
from pipelines.tiles import Tile, draw_tiles, require_png

INDEXES = ("exact", "faiss")


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for: a name, its vector, rows that are the query itself, and an image to show."""

    name: str
    vector: Vectors  # [dim]
    own: Int64s
    image: bytes | None


@dataclass(frozen=True, slots=True)
class Hit:
    """A row of the file and its cosine to the query, or minus its distance where vectors are raw."""

    row: Row
    score: float


def search(
    file: Path,
    *,
    images: Sequence[Path] = (),
    keys: Sequence[str] = (),
    k: int = 10,
    model: str | None = None,
    index: str = "exact",
    sheet: Path | None = None,
) -> dict[str, Any]:
    """The `k` nearest rows of each image and key, nearest first, ties in the file's order; what --json prints.

    The model is the one that made the file, or `model` where that lies elsewhere now. The rows of a key are not found by it.
    Raises ValueError for bad input and for a model that did not make the file.
    """
    if not images and not keys:
        raise ValueError("nothing to look for: give --image FILE or --key KEY")
    if index not in INDEXES:
        raise ValueError(f"--index {index!r}: it is one of {', '.join(INDEXES)}")
    if sheet is not None:
        require_png(sheet)
    embeddings = Embeddings(file)
    if embeddings.raw and index == "faiss":
        raise ValueError(
            f"--index faiss searches by cosine, and {str(file)!r} holds raw vectors, compared by euclidean distance; "
            "leave it out"
        )
    source = _source(embeddings) if sheet is not None else None
    queries = [*_of_images(embeddings, images, model), *(_of_key(embeddings, key, source) for key in keys)]
    found, recall = _search(embeddings, queries, min(k, embeddings.num_rows), index)
    if sheet is not None:
        assert source is not None
        draw_tiles([_tiles(query, hits, source, raw=embeddings.raw) for query, hits in zip(queries, found, strict=True)], sheet)
    return {
        "embeddings": str(file),
        "searched": embeddings.num_rows,
        "index": index,
        "distance": "euclidean" if embeddings.raw else "cosine",
        "recall_at_10": recall,
        "sheet": None if sheet is None else str(sheet),
        "queries": [
            {"query": q.name, "hits": [_told(hit, raw=embeddings.raw) for hit in hits]}
            for q, hits in zip(queries, found, strict=True)
        ],
    }


def describe(result: dict[str, Any]) -> str:
    """For a person."""
    lines = []
    shown = "distance" if result["distance"] == "euclidean" else "score"
    for query in result["queries"]:
        lines.append(query["query"])
        for rank, hit in enumerate(query["hits"], 1):
            label = "" if hit["label"] is None else f"  {hit['label']}"
            member = f".{hit['member']}" if hit["member"] else ""
            lines.append(f"{rank:4}  {hit[shown]:.4f}  {hit['key']}{member}{label}")
    if result["recall_at_10"] is not None:
        lines.append(f"faiss finds {result['recall_at_10']:.1%} of the true ten nearest, measured on a sample")
    if result["sheet"] is not None:
        lines.append(f"sheet {result['sheet']}")
    return "\n".join(lines)


def model_of(embeddings: Embeddings, reference: str | None = None) -> Model:
    """The model that made the file, from where it was then, or from `reference`. Raises ValueError when it is another one."""
    about = embeddings.about
    if reference is None and "reference" not in about:
        raise ValueError(f"{embeddings.path} does not tell what model made it: give --model MODEL")
    try:
        model = open_model(reference or about["reference"], uri=None if reference else about["uri"])
    except ValueError as error:
        if reference is not None:
            raise
        raise ValueError(
            f"the model that made {embeddings.path} is not there any more ({error}); give --model MODEL"
        ) from error
    if "weights" in about and weights_digest(model) != about["weights"]:
        raise ValueError(
            f"{model.origin} did not make {embeddings.path}: that was {about['model']} with other weights, and vectors of two "
            "models cannot be compared; embed again, or give --model MODEL"
        )
    if model.raw != embeddings.raw:
        raise ValueError(
            f"{model.origin} gives {'raw' if model.raw else 'unit'} vectors, and {embeddings.path} does not tell that it holds "
            "such; embed again"
        )
    if embeddings.dim > model.dim or ("weights" not in about and embeddings.dim != model.dim):
        raise ValueError(f"{embeddings.path} has vectors of {embeddings.dim} numbers, those of {model.origin} have {model.dim}")
    return model


def _of_images(embeddings: Embeddings, images: Sequence[Path], reference: str | None) -> list[Query]:
    if not images:
        return []
    model = model_of(embeddings, reference)
    data = model.data("query")
    files, pixels = [], []
    for path in images:
        try:
            files.append(path.read_bytes())
            pixels.append(cut(files[-1], np.zeros(NUM_DRAWS, np.float32), data, Augment()))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    with torch.inference_mode():
        found = model.module(torch.stack(pixels).contiguous())[:, : embeddings.dim].float()
    vectors = (found if model.raw else F.normalize(found, dim=1)).numpy()
    nothing = np.empty(0, np.int64)
    return [Query(str(path), vector, nothing, file) for path, vector, file in zip(images, vectors, files, strict=True)]


def _of_key(embeddings: Embeddings, key: str, source: ImageSet | None) -> Query:
    rows = embeddings.find(key)
    if not rows:
        raise ValueError(f"no key {key!r} in {embeddings.path}")
    first = embeddings.rows(rows[:1])[rows[0]]
    return Query(key, embeddings.vector(rows[0]), np.asarray(rows), _image(first, source))


def _search(embeddings: Embeddings, queries: Sequence[Query], k: int, index: str) -> tuple[list[list[Hit]], float | None]:
    vectors, own = np.stack([query.vector for query in queries]), [query.own for query in queries]
    recall = None
    if index == "exact":
        best = nearest(embeddings.vectors(), vectors, k, skip=own, raw=embeddings.raw)
    else:
        from cluster.ann import Approximate

        graph = Approximate(embeddings)
        best, recall = graph.search(vectors, k, own), graph.recall
    rows = embeddings.rows(sorted({row for one in best for row in one.rows.tolist()}))
    return [
        [Hit(rows[row], score) for row, score in zip(one.rows.tolist(), one.scores.tolist(), strict=True)] for one in best
    ], recall


def _source(embeddings: Embeddings) -> ImageSet:
    if "source" not in embeddings.about:
        raise ValueError(f"{embeddings.path} does not tell where its images are, so there is nothing to draw on a sheet")
    try:
        return open_images(embeddings.about["source"])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the images of {embeddings.path} are not there any more, so there is no sheet: {error}") from error


def _tiles(query: Query, hits: Sequence[Hit], source: ImageSet, *, raw: bool) -> list[Tile]:
    tiles = [Tile(query.image, Path(query.name).name, "query")]
    for hit in hits:
        tiles.append(Tile(_image(hit.row, source), hit.row.label or hit.row.key, f"{abs(hit.score) if raw else hit.score:.3f}"))
    return tiles


def _image(row: Row, source: ImageSet | None) -> bytes | None:
    if source is None or row.record is None:
        return None
    try:
        return source.read(row.record, row.member)
    except (OSError, ValueError, RuntimeError):
        return None


def _told(hit: Hit, *, raw: bool) -> dict[str, Any]:
    about = asdict(hit.row)
    told = {**{name: about[name] for name in ("key", "label", "member")}, "row": about["number"], "score": hit.score}
    return told | ({"distance": abs(hit.score)} if raw else {})
