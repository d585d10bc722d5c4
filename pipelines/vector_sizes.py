"""The lengths of the vectors and targets of a data set: one of each, or none."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipelines.hashing import Int64s
from pipelines.samples import TARGET
from pipelines.work import Discard


class VectorSizes:
    """`vector`: numbers of every vector that stands for an image; `target`: of every record's target; 0 where there is none."""

    def __init__(self) -> None:
        self.vector = self.target = 0
        self._begun = False

    def add(self, shard: str, samples: pa.Table) -> None:
        """Take a shard's samples into account. Raises Discard when they do not fit to those before them."""
        lists = samples["dim"].combine_chunks()
        dim = lists.flatten().to_numpy().astype(np.int64)
        is_target = samples["view"].combine_chunks().flatten().to_numpy() == TARGET
        record = np.repeat(np.arange(samples.num_rows), lists.value_lengths().to_numpy())
        is_vector = (dim > 0) & ~is_target
        if is_vector.any():
            self.vector = self.vector or int(dim[is_vector][0])
            self._require(shard, samples, record[is_vector], dim[is_vector], self.vector, "vectors")
        of_record = np.zeros(samples.num_rows, np.int64)
        of_record[record[is_target]] = dim[is_target]
        if not self._begun and samples.num_rows:
            self.target, self._begun = int(of_record[0]), True
        self._require(shard, samples, np.arange(samples.num_rows), of_record, self.target, "targets")

    def _require(self, shard: str, samples: pa.Table, record: Int64s, dim: Int64s, wanted: int, what: str) -> None:
        wrong = np.flatnonzero(dim != wanted)
        if len(wrong):
            key, source = (samples[name][int(record[wrong[0]])].as_py() for name in ("key", "source"))
            seen, before = (f"of {n} numbers" if n else "missing" for n in (int(dim[wrong[0]]), wanted))
            rule = "all records of a data set have one, or none has; " if what == "targets" else ""
            raise Discard(
                f"{what}: that of {key} ({source}) in {shard} is {seen}, those before it are {before}; "
                f"{rule}they must all be of one length"
            )
