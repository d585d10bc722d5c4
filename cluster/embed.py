"""`nearfar embed`: the images of a source as vectors in one parquet file, resumable, on Ray Data or without Ray."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.embed_worker import Job, Part, embed_span
from cluster.embeddings import VERSION, Embeddings, Parts
from cluster.models import Model, open_model
from cluster.packing import Interrupted
from cluster.progress import bar, say
from cluster.store import redact, tracking_uri
from cluster.weights import weights_digest
from configs.schema import Tracking
from pipelines.folders import explain_full, make_folder, sync
from pipelines.image_set import ImageSet, Span
from pipelines.images import open_images
from pipelines.parallel import in_process, process_map
from pipelines.remote import is_url
from pipelines.work import partial_folder, work_folder

RECORDS_A_SPAN = 2048  # what a kill costs a worker at most
ROW_BYTES = 100  # of a row beside its vector, about

Run = Callable[[Iterable[Span]], Generator[Part, None, None]]  # parts may come in any order


@dataclass(frozen=True, slots=True)
class Place:
    """Where the work is done: in processes of this machine, on its own Ray, or on the Ray at `address`."""

    local: bool = False
    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float = 0.0


def embed(model: str, source: str, out: Path, *, place: Place, batch: int = 256, dim: int | None = None) -> dict[str, Any]:
    """Write OUT, and OUT.rejected.jsonl when images could not be read; returns what there is to tell.

    A call that is stopped leaves OUT.partial behind, and the same call goes on there; one whose result is there already does
    nothing. Raises ValueError for bad input, and when model, source or options are others than before; RuntimeError when the
    disk is full, Ray cannot be reached or a store does not answer; Interrupted at Ctrl-C.
    """
    _require_file(out)
    if place.local and place.gpus_per_worker and (place.workers or 1) > 1:
        raise ValueError("--local with several --workers computes on CPUs; for several GPUs leave --local out")
    reference, uri = _absolute(model), tracking_uri(Tracking(), Path("runs"))
    opened = open_model(reference, uri=uri)
    dim = _checked(dim, opened)
    images = open_images(source)
    job = Job(reference, uri, weights_digest(opened), images.location, images.digest, batch, dim, 0, None, False)
    about = _about(job, opened, images)
    before = _result(out, about)
    if before is not None:
        return before
    _require_space(out, images, dim)
    make_folder(out.absolute().parent, exist_ok=True)
    plan = {name: about[name] for name in ("model", "weights", "batch", "dim")}
    plan |= {"source": images.digest, "span": RECORDS_A_SPAN}
    try:
        with work_folder(out.absolute(), plan) as folder:
            return _embed(job, images, out, folder, place, about)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; what is done is kept in {partial_folder(out)}, the same command goes on there"
        ) from None


def rejected_file(out: Path) -> Path:
    """Where it is told which images could not be read."""
    return out.with_name(f"{out.name}.rejected.jsonl")


def _embed(job: Job, images: ImageSet, out: Path, folder: Path, place: Place, about: dict[str, Any]) -> dict[str, Any]:
    parts = Parts(folder / "parts")
    starts = range(0, images.num_records, RECORDS_A_SPAN)
    todo = [number for number in range(len(starts)) if number not in parts.there]
    spans = (images.span(n, starts[n], min(starts[n] + RECORDS_A_SPAN, images.num_records)) for n in todo)
    resumed = parts.count()
    done, began, ended = resumed, time.time(), time.time()
    with bar("embedding", "images") as report, _running(job, place, len(todo)) as run:
        report(done, images.num_images)
        for number, part in enumerate(run(spans), 1):
            parts.add(part)
            began = part.began if number == 1 else min(began, part.began)
            done, ended = done + part.images, time.time()
            report(done, max(done, images.num_images) if number < len(todo) else done)
    rows, rejected = parts.join(len(starts), folder / "made.parquet", job.dim, about)
    _publish(folder, out, rejected)
    speed = (done - resumed) / (ended - began) if done > resumed else None
    return _told(out, about, rows, len(rejected), speed=speed, resumed=resumed)


def _publish(folder: Path, out: Path, rejected: list[dict[str, Any]]) -> None:
    """OUT comes last but for tidying up: with it there, all is there."""
    place = rejected_file(out)
    if rejected:
        made = folder / "rejected.jsonl"
        made.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rejected), "utf-8")
        sync(made)
        os.replace(made, place)
    else:
        place.unlink(missing_ok=True)
    os.replace(folder / "made.parquet", out)
    sync(out.absolute().parent)
    shutil.rmtree(folder)


@contextmanager
def _running(job: Job, place: Place, most: int) -> Iterator[Run]:
    """A map of spans to parts. `most`: spans there are to do; for none nothing is started."""
    if most and not place.local:
        from cluster.embed_ray import ray_embedder

        with ray_embedder(job, place.address, place.workers, place.gpus_per_worker, most) as run:
            yield run
        return
    workers = min(place.workers or 1, most)
    if workers <= 1:
        alone = replace(job, threads=2, torch_threads=None, gpu=place.gpus_per_worker > 0)
        yield partial(in_process, partial(embed_span, alone))
        return
    cores = max(1, (os.cpu_count() or 1) // workers)
    one = replace(job, threads=cores, torch_threads=cores, gpu=False)
    yield partial(process_map(workers), partial(embed_span, one))


def _absolute(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.absolute()) if "://" not in model and path.exists() else model


def _checked(dim: int | None, model: Model) -> int:
    if dim is not None and not 1 <= dim <= model.dim:
        raise ValueError(f"--dim {dim}: the vectors of {model.origin} have {model.dim} numbers; give 1 to {model.dim}")
    if model.raw and dim not in (None, model.dim):
        raise ValueError(
            f"--dim {dim}: the vectors of {model.origin} are raw, compared by euclidean distance, and shorter lengths are for "
            "unit vectors; leave --dim out"
        )
    return dim or model.dim


def _require_file(out: Path) -> None:
    if is_url(str(out)) or out.suffix != ".parquet":
        raise ValueError(f"OUT must be a .parquet file on this machine, got {str(out)!r}")
    if out.is_dir():
        raise ValueError(f"{str(out)!r} is a folder; give a .parquet file")


def _require_space(out: Path, images: ImageSet, dim: int) -> None:
    """The parts and what they are joined into lie on the disk at the same time."""
    needed = 2 * images.num_images * (4 * dim + ROW_BYTES)
    there = sum(path.stat().st_size for path in partial_folder(out).glob("parts/*"))
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if needed - there > shutil.disk_usage(folder).free:
        raise RuntimeError(explain_full(out, needed - there))


def _about(job: Job, model: Model, images: ImageSet) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": model.origin,
        "reference": job.model,
        # A registry's, but for one with a password in it: whoever gets the file must not get that.
        "uri": None if os.path.exists(job.model) or redact(job.uri) != job.uri else job.uri,
        "weights": job.weights,
        "dim": job.dim,
        "distance": "euclidean" if model.raw else "cosine",
        "batch": job.batch,
        "source": images.location,
        "digest": images.digest,
        "kind": images.kind,
    }


def _result(out: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What there is to tell of an OUT that is there. Raises ValueError when it is another one's."""
    if not out.exists():
        return None
    there = Embeddings(out)
    changed = [name for name in ("model", "weights", "batch", "dim", "digest") if there.about.get(name) != about[name]]
    if changed:
        told = "; ".join(f"{name}: {there.about.get(name)} there, {about[name]} now" for name in changed)
        raise ValueError(f"{str(out)!r} exists and was made otherwise ({told}): remove it or give another name")
    say(f"{out} is there already; nothing to do")
    shutil.rmtree(partial_folder(out), ignore_errors=True)
    left = rejected_file(out)
    rejected = len(left.read_text("utf-8").splitlines()) if left.exists() else 0
    return _told(out, there.about, there.num_rows, rejected, speed=None, resumed=there.num_rows + rejected)


def _told(out: Path, about: dict[str, Any], rows: int, rejected: int, *, speed: float | None, resumed: int) -> dict[str, Any]:
    return {
        "out": str(out),
        "rows": rows,
        "dim": about["dim"],
        "rejected": rejected,
        "rejected_file": str(rejected_file(out)) if rejected else None,
        "images_per_s": None if speed is None else round(speed, 1),
        "resumed_images": resumed,
        "model": about["model"],
        "source": about["source"],
    }
