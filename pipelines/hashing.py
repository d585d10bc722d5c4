"""Stable integers for everything that has to be the same on every machine: splitmix64 streams and content hashes."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64s = NDArray[np.int64]
Uint64s = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def mix(x: Uint64s) -> Uint64s:
    """The splitmix64 finaliser, elementwise: a bijection of the 64-bit integers (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    return x ^ (x >> np.uint64(31))


def hash_ints(*parts: ArrayLike) -> Uint64s:
    """Hash integers (arrays broadcast against each other) into uint64 [n >= 1]; the order of the parts matters."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        value = np.atleast_1d(np.asarray(part)).astype(np.uint64)  # one element at least: numpy warns of overflow in scalars
        state = mix(state ^ mix(value + GOLDEN)) + GOLDEN
    return mix(state)


def stream(key: Uint64s, n: int) -> Uint64s:
    """The first n values of the splitmix64 streams that start at `key`.  key [...] -> [..., n]"""
    steps = np.arange(1, n + 1, dtype=np.uint64) * GOLDEN
    return mix(key[..., None] + steps)


def permutation(n: int, *key: int) -> Int64s:
    """A shuffle of 0..n-1 that depends on the key only, not on numpy's generators."""
    return np.argsort(stream(hash_ints(*key), n)[0], kind="stable").astype(np.int64)


def hash_bytes(data: bytes) -> int:
    """63 bits of blake2b: the `uid` of a member, never negative as int64."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 1


def hash_entity(entity: str, *, namespace: str = "") -> int:
    """63 bits of blake2b of (namespace, entity): the `group` of a member."""
    return hash_bytes(f"{namespace}\0{entity}".encode("utf-8", "surrogateescape"))
