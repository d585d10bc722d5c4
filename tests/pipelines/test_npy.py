"""Vectors as files: what numpy writes is read, everything else is refused, and nothing in it is run."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.prepare import prepare, prepare_vector
from pipelines.vectors import decode_vector, encode_vector

VECTOR = np.asarray([0.5, -2.0, 3.25, 0.0, 100.0])  # the same in every float


def save(array: NDArray[np.generic], version: tuple[int, int] | None = None, *, pickle: bool = False) -> bytes:
    """As numpy does."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, allow_pickle=pickle)
    return file.getvalue()


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4", ">f8"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_what_numpy_writes_is_read_as_float32(kind: str, version: tuple[int, int]) -> None:
    found = decode_vector(save(VECTOR.astype(kind), version), len(VECTOR))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, VECTOR)


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "v.npy").write_bytes(encode_vector(VECTOR.astype(np.float32)))
    found = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert found.dtype == np.dtype("<f4")
    np.testing.assert_array_equal(found, VECTOR)


def test_the_same_numbers_are_packed_as_the_same_bytes() -> None:
    packed = [prepare(save(VECTOR.astype(kind))) for kind in ("<f2", "<f4", ">f8")]
    assert len({one.data for one in packed}) == len({one.uid for one in packed}) == 1
    assert (packed[0].suffix, packed[0].dim, packed[0].width) == ("npy", len(VECTOR), 0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), np.float32), "one dimension"),
        (np.zeros((), np.float32), "one dimension"),
        (np.zeros(0, np.float32), "one dimension"),
        (np.arange(3), "int64"),
        (np.zeros(3, [("a", "<f4")]), "a vector is of float32"),
        (np.asarray(["a", "b"]), "a vector is of float32"),
        (np.zeros(2, np.complex64), "complex64"),
        (np.asarray([1.0, np.nan]), "not finite"),
        (np.asarray([1.0, -np.inf], np.float16), "not finite"),
        (np.asarray([1e300]), "not finite in float32"),
    ],
)
def test_what_is_no_vector_is_refused(array: NDArray[np.generic], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_vector(save(array))


def test_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="5 numbers, not 4"):
        decode_vector(save(VECTOR), 4)


def test_a_file_cut_off_anywhere_or_too_long_is_refused() -> None:
    whole = save(VECTOR)
    for data in (*(whole[:end] for end in range(len(whole))), whole + b"\0"):
        with pytest.raises(ValueError, match=r"damaged|no \.npy"):
            prepare_vector(data)


def test_a_flipped_bit_in_the_header_is_refused_or_harmless() -> None:
    whole = bytearray(save(VECTOR))
    for bit in range(8 * (len(whole) - 8 * len(VECTOR))):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        try:
            assert decode_vector(bytes(data)).dtype == np.float32
        except ValueError:
            continue


def test_a_promise_of_many_numbers_allocates_nothing() -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with pytest.raises(ValueError, match="announced"):
        decode_vector(file.getvalue())


def test_python_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = Evil(tmp_path / "made")
    with pytest.raises(ValueError, match="never read"):
        prepare(save(array, pickle=True))
    assert not (tmp_path / "made").exists()
    np.load(io.BytesIO(save(array, pickle=True)), allow_pickle=True)
    assert (tmp_path / "made").is_dir(), "it would have been run"
