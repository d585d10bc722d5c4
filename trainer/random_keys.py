"""Random numbers that depend on what they are for, not on who draws them: the same on any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64


def uniform(seed: int, *keys: Tensor) -> Tensor:
    """A number in [0, 1) for the integers `keys` (they broadcast), float64: the top 53 bits of their hash.

    h = 0 first, then h = mix(h + key + GOLDEN) for the seed and every key, modulo 2^64; `mix` is SplitMix64's (Steele et
    al. 2014).
    """
    return unit_interval(hashed(seed, *keys))


def hashed(seed: int, *keys: Tensor) -> Tensor:
    """The hash of `uniform` as int64."""
    found = torch.zeros((), dtype=torch.int64, device=keys[0].device)
    for key in (torch.tensor(_signed(seed), device=keys[0].device), *keys):
        found = mix(found + key + _signed(GOLDEN))
    return found


def mix(x: Tensor) -> Tensor:
    """Int64 to int64, every bit of the result from every bit of x."""
    x = (x ^ _shift(x, 30)) * _signed(FIRST)
    x = (x ^ _shift(x, 27)) * _signed(SECOND)
    return x ^ _shift(x, 31)


def unit_interval(x: Tensor) -> Tensor:
    """Int64 to float64 in [0, 1)."""
    return _shift(x, 11).double() * 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts the sign in


def _signed(x: int) -> int:
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x
