"""The k-th largest magnitude of a tensor that is only seen in chunks; exact.

Owns: a radix selection on the bit patterns of floats, which order like integers once the sign is cleared.
Each pass counts the next bits of the entries that are still candidates; once few are left they are gathered
and selected directly. Memory: one chunk, one histogram and at most `GATHER` entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DIRECT = 2**14
"""Below this many entries one call of kthvalue is faster than a histogram (262144 entries: 3.8 against 1 ms)."""

GATHER = 2**20
"""Candidates gathered at most; 4 MiB of float32."""

DIGIT_BITS = 15
"""Bits of a magnitude counted in one pass: exponent and 7 bits of fraction of a float32."""

LAYOUTS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}
"""Float dtype -> (integer dtype of its pattern, bits below the sign)."""


def kth_largest_magnitude(chunks: Callable[[], Iterable[Tensor]], n_entries: int, k: int) -> float:
    """The k-th largest |entry|.

    Args:
        chunks: starts a new pass over all entries; float32 or float64, the same entries each time.
        n_entries: how many there are.
        k: 1 is the largest.

    Raises:
        ValueError: k is not in 1..n_entries.
    """
    if not 1 <= k <= n_entries:
        raise ValueError(f"the {k}-th largest of {n_entries} entries")
    if n_entries <= DIRECT:
        return _kth_largest(torch.cat([chunk.abs().flatten() for chunk in chunks()]), k)
    return _radix_select(chunks, k)


def _kth_largest(magnitudes_N: Tensor, k: int) -> float:
    return float(torch.kthvalue(magnitudes_N, len(magnitudes_N) - k + 1).values)


def _radix_select(chunks: Callable[[], Iterable[Tensor]], k: int) -> float:
    prefix, prefix_bits = 0, 0
    while True:
        counts, total_bits = _count(chunks(), prefix, prefix_bits)
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, k))
        digit = len(counts) - 1 - place
        k -= int(from_top[place - 1]) if place else 0
        width = min(DIGIT_BITS, total_bits - prefix_bits)
        prefix, prefix_bits = (prefix << width) | digit, prefix_bits + width
        if int(counts[digit]) <= GATHER or prefix_bits == total_bits:
            return _gathered(chunks(), prefix, prefix_bits, k)


def _count(chunks: Iterable[Tensor], prefix: int, prefix_bits: int) -> tuple[Tensor, int]:
    """How many entries starting with `prefix` have each next digit, and the bits of a whole pattern."""
    counts: Tensor | None = None
    total_bits = 0
    for chunk in chunks:
        pattern_N, total_bits = _pattern(chunk)
        if prefix_bits:
            pattern_N = pattern_N[(pattern_N >> (total_bits - prefix_bits)) == prefix]
        width = min(DIGIT_BITS, total_bits - prefix_bits)
        digits_N = (pattern_N >> (total_bits - prefix_bits - width)) & ((1 << width) - 1)
        found = torch.bincount(digits_N, minlength=1 << width)
        counts = found if counts is None else counts + found
    if counts is None:
        raise ValueError("no chunks to select from")
    return counts, total_bits


def _gathered(chunks: Iterable[Tensor], prefix: int, prefix_bits: int, k: int) -> float:
    found = []
    for chunk in chunks:
        pattern_N, total_bits = _pattern(chunk)
        candidates_N = chunk.abs().flatten()[(pattern_N >> (total_bits - prefix_bits)) == prefix]
        if prefix_bits == total_bits and len(candidates_N):
            return float(candidates_N[0])
        found.append(candidates_N)
    return _kth_largest(torch.cat(found), k)


def _pattern(chunk: Tensor) -> tuple[Tensor, int]:
    integer, bits = LAYOUTS[chunk.dtype]
    return chunk.flatten().view(integer) & ((1 << bits) - 1), bits
