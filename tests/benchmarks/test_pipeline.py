"""From tars of photographs to crops for an encoder, against what its parts cost and against stock webdataset.

No time is asserted: machines differ and are shared. Both sides of a comparison take turns, and the best round of each counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import simplejpeg
import torch
import webdataset
from PIL import Image

from configs.schema import Data
from pipelines.manifest import Manifest
from pipelines.stream import Loader
from tests.benchmarks.measure import FULL, MIB, resident, table
from tests.benchmarks.photos import pack_photos, packed_files

pytestmark = pytest.mark.benchmark

SIDE, CROP = 224, (0.08, 1.0)
PAIRS, BATCH, PREFETCH = 128, 64, 2
EPOCH_BATCHES = 30  # of what is called an epoch where memory is measured
ROUNDS = 10 if FULL else 4
SIZES = [(500, 375), (1024, 768)]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def photos(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    width, height = request.param
    return pack_photos(tmp_path_factory.mktemp("photos"), width, height, pairs=PAIRS)


class Cost(NamedTuple):
    """Of one image, in seconds: by the clock, and of all the threads of this process."""

    wall: float
    cpu: float


def cheapest(functions: Mapping[str, Callable[[], Cost]], rounds: int = ROUNDS) -> dict[str, Cost]:
    """The least of `rounds`, taken in turns, so that a busy machine is busy for all."""
    costs: dict[str, list[Cost]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            costs[name].append(function())
    return {name: Cost(min(cost.wall for cost in seen), min(cost.cpu for cost in seen)) for name, seen in costs.items()}


def cost(work: Callable[[], None], images: int) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost((time.perf_counter() - wall) / images, (time.process_time() - cpu) / images)


def loader(manifest: Manifest, **options: Any) -> Loader:
    settings = {"image_size": SIDE, "batch": BATCH, "lanes": 4, "threads": 1, "augment": {"crop": CROP}, **options}
    return Loader(manifest, Data.model_validate({"train": "photos", "prefetch": PREFETCH, **settings}), seed=0)


def ours(manifest: Manifest, **options: Any) -> Cost:
    """Two epochs through the loader, once as much is read ahead as will be all the time and its memory goes round."""

    def take(count: int) -> None:
        for _ in range(count):
            next(batches)

    with loader(manifest, **options) as batches:
        take(2 * (PREFETCH + 1))
        num_batches = 2 * PAIRS // BATCH
        return cost(lambda: take(num_batches), 2 * BATCH * num_batches)


def raw(files: list[bytes]) -> None:
    """Nothing but libjpeg-turbo, from memory, in full."""
    for file in files:
        simplejpeg.decode_jpeg(file, "RGB")


def stock(shards: list[str], finish: Callable[[torch.Tensor], torch.Tensor] = lambda crop: crop) -> None:
    """webdataset with Pillow, and the random crops and batches that everybody makes of it."""
    rng = np.random.default_rng(0)
    samples = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("anchor.jpg", "positive.jpg")
    crops = samples.map(lambda pair: tuple(finish(_random_resized_crop(image, rng)) for image in pair))
    for anchor, positive in crops.batched(BATCH):
        assert anchor.shape == positive.shape == (BATCH, 3, SIDE, SIDE)


def _random_resized_crop(image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
    area = rng.uniform(*CROP) * image.width * image.height
    ratio = np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
    width, height = (
        min(most, round(float(np.sqrt(x)))) for most, x in zip(image.size, (area * ratio, area / ratio), strict=True)
    )
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    crop = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR))).permute(2, 0, 1).contiguous()


@contextmanager
def one_core() -> Iterator[None]:
    """This thread, and those it starts, on the first core that it may use; torch's kernels with one thread each."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def test_images_per_second_on_one_core(photos: Manifest) -> None:
    files, shards = packed_files(photos), [str(photos.shard_path(shard)) for shard in range(len(photos.sizes))]
    sides = {
        "this loader": lambda: ours(photos),
        "raw libjpeg-turbo decode": lambda: cost(lambda: raw(files), len(files)),
        "stock webdataset, Pillow": lambda: cost(lambda: stock(shards), len(files)),
        # What torchvision's ToTensor makes of a crop; ours leaves it to the device, a batch at a time.
        "the same, to float32 in 0..1": lambda: cost(lambda: stock(shards, lambda crop: crop.float().div(255)), len(files)),
    }
    with one_core():
        costs = cheapest(sides)
    mine = costs["this loader"]
    goals = {"raw libjpeg-turbo decode": "0.55", "stock webdataset, Pillow": "2.3"}
    rows = [
        (name, f"{1 / c.wall:.0f}", f"{c.wall / mine.wall:.2f}", f"{c.cpu / mine.cpu:.2f}", goals.get(name, ""))
        for name, c in costs.items()
    ]
    title = f"{_size(photos)} pairs from tar to crops of {SIDE}, one core"
    table(title, ["", "images/s", "ours over it", "by CPU time", "goal"], rows)


def test_two_threads_over_one(photos: Manifest) -> None:
    files = packed_files(photos)
    with ThreadPoolExecutor(2) as pool:

        def both() -> None:
            list(pool.map(raw, [files[::2], files[1::2]]))

        sides = {
            "this loader, 1 thread": lambda: ours(photos, threads=1),
            "this loader, 2 threads": lambda: ours(photos, threads=2),
            "raw decode, 1 thread": lambda: cost(lambda: raw(files), len(files)),
            "raw decode, 2 threads": lambda: cost(both, len(files)),
        }
        costs = cheapest(sides)
    one, two, raw_one, raw_two = costs.values()
    over = {"this loader, 2 threads": one.wall / two.wall, "raw decode, 2 threads": raw_one.wall / raw_two.wall}
    rows = [
        (name, f"{1 / c.wall:.0f}", f"{over[name]:.2f}" if name in over else "", f"{1e3 * c.cpu:.2f}")
        for name, c in costs.items()
    ]
    title = f"{_size(photos)} pairs: two threads over one (goal: 1.8; raw decode shows what the machine has to give)"
    table(title, ["", "images/s", "over one", "CPU ms/image"], rows)


def test_memory_over_five_epochs(photos: Manifest) -> None:
    rows = []
    with loader(photos, threads=2) as batches:
        for epoch in range(6):
            for _ in range(EPOCH_BATCHES):
                next(batches)
            rows.append((epoch, f"{resident() / MIB:.1f} MiB"))
    title = (
        f"{_size(photos)} pairs: memory of the process after each {EPOCH_BATCHES * BATCH} pairs (goal: flat after the first)"
    )
    table(title, ["epoch", "RSS"], rows)


def test_share_of_time_that_the_trainer_waited(photos: Manifest) -> None:
    pace = ours(photos).wall * 2 * BATCH
    rows = []
    for share in (0.5, 0.9, 1.1, 2.0):

        def train(num_steps: int, step_s: float = share * pace) -> None:
            for _ in range(num_steps):
                next(batches)
                time.sleep(step_s)  # as a trainer whose work is on a GPU

        with loader(photos) as batches:
            train(PREFETCH + 2)
            before, start = batches.wait_s, time.perf_counter()
            train(8)
            waited = (batches.wait_s - before) / (time.perf_counter() - start)
        rows.append((f"{share:.1f}", f"{waited:.0%}", f"{max(0.0, 1 - share):.0%}"))
    table(f"{_size(photos)} pairs, one thread", ["step over batch time", "waited", "at best"], rows)


def _size(manifest: Manifest) -> str:
    first = manifest.table(0)
    return f"{first.width[0]}x{first.height[0]}"
