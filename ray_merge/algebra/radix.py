"""Selecting the k-th largest magnitude by the bits of floats, where entries are only counted; torch-free.

Owns: the search itself. A float's bits below the sign order like integers. Each round counts, among the entries that
share the bits found so far, how many have each value of the next bits (a histogram); the histograms of several
places are added up, so the entries themselves never meet. Exact: counts are integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DIGIT_BITS = (15, 16)
"""Bits counted in the first and in later rounds: exponent and 7 bits of fraction of a float32, then its other 16."""

MAGNITUDE_BITS = {"float32": 31, "float64": 63}
"""Bits below the sign."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many entries have each value of the bits counted; values that do not occur are left out.

    Args:
        digits: ascending.
        counts: of each, at least 1.
    """

    digits: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> Histogram:
        """From one count for every value, 0 where it does not occur."""
        digits = np.flatnonzero(counts)
        return cls(digits, counts[digits])

    @property
    def total(self) -> int:
        """Entries in all."""
        return int(self.counts.sum())


@dataclass(frozen=True, slots=True)
class Prefix:
    """The upper bits that candidates share.

    Args:
        value: of those bits.
        n_bits: how many they are; 0 at the start.
        total_bits: of a magnitude.
    """

    value: int = 0
    n_bits: int = 0
    total_bits: int = 31

    @property
    def width(self) -> int:
        """Bits that the next round counts."""
        return min(DIGIT_BITS[min(self.n_bits, 1)], self.total_bits - self.n_bits)

    @property
    def complete(self) -> bool:
        """Whether it names one magnitude."""
        return self.n_bits == self.total_bits

    @property
    def magnitude(self) -> float:
        """The magnitude that a complete prefix names."""
        bits = np.array([self.value], dtype=np.int32 if self.total_bits == 31 else np.int64)
        return float(bits.view(np.float32 if self.total_bits == 31 else np.float64)[0])


def narrow(prefix: Prefix, k: int, found: Histogram) -> tuple[Prefix, int, int]:
    """Take the digit that the k-th largest candidate has.

    Args:
        prefix: what candidates share.
        k: 1 is the largest of them.
        found: candidates by their next `prefix.width` bits.

    Returns:
        The longer prefix, the place among its candidates, and how many these are.

    Raises:
        ValueError: there are fewer than k candidates.
    """
    if not 1 <= k <= found.total:
        raise ValueError(f"the {k}-th largest of {found.total} entries")
    from_top = found.counts[::-1].cumsum()
    place = int(np.searchsorted(from_top, k))
    digit, n_candidates = int(found.digits[::-1][place]), int(found.counts[::-1][place])
    above = int(from_top[place - 1]) if place else 0
    longer = Prefix((prefix.value << prefix.width) | digit, prefix.n_bits + prefix.width, prefix.total_bits)
    return longer, k - above, n_candidates
