"""How much arithmetic one merge takes at one site; torch-free, for the estimate of hours (plan/estimate.py).

Owns: what a family of methods costs, in floating-point operations of a core that multiplies float32 matrices at
90 GFLOP/s; what is bound by memory or by sorting is given as arithmetic that takes as long. Measured with one thread
on sites of 2048 x 2048 and 4 or 8 adapters of rank 16 or 32; a method is within about a factor of 2 of its time there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

Work = Callable[[str, tuple[int, int], Sequence[int]], float]
"""(space, (O, I), ranks of the adapters that touch the site) -> operations of one merge there, without rounding."""

PRODUCT_FLOPS = 2
"""Of one entry of a dense product, for each rank: a multiplication and an addition."""

QR_FLOPS = 25
"""Of one entry of a factor and each rank, in float64: a QR and what multiplies its Q."""

SVD_FLOPS = 60
"""Of one entry of an (R, R) matrix and each rank, in float64: an SVD with both sides."""

ELECTED, VOTED, VOTED_AND_ELECTED, MASKED, TRIMMED_TWICE, RANKED = 420, 300, 600, 320, 650, 6000
"""Of one entry and adapter. ties and dare: trim or drop, elect, average; consensus; consensus_ties; emr; breadcrumbs:
two thresholds; della: rows are sorted."""

SCORED, SCORED_PAIR = 1400, 640
"""pcb: of one entry and adapter, and of one entry and each pair of adapters, a pair with itself included."""

FLOAT64 = 2
"""How much longer a rule takes over coordinates, which are float64."""

PRUNED = 860
"""Of one entry of a factor in robustmerge: the selection of a threshold."""

PAIRED = 12
"""Of one entry of a factor and each rank in lora_lego: Gram matrix and k-means."""

FILTERED, FILTERED_SIDE = 800, 1 / 8
"""Of one entry in free: its Fourier transform back, and for each row or column, of which there are fewer, the product
with the frequencies that the default cutoff removes."""

WEIGHED = 110
"""Of one entry and adapter in fisher: its Fisher information read twice, a share, and two running sums."""

GATHERED, REGRESSED = 60, 3
"""regmean: of one entry of a Gram matrix and each adapter, to read it and add it up; and how much longer its float64
Cholesky factor, thin products and triangular solves take (15 to 25 GFLOP/s for 1024 to 4096 inputs)."""

SPECTRAL_SVDS = 4
"""Of (R, R) matrices in tsv_m and iso_*: directions and two polar factors."""


def made(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """What it takes to see all coordinates of all adapters once: products of factors, or the bases of a space."""
    total = sum(ranks)
    if space == "dense":
        return _product(shape, total)
    # The KnOTS basis has one side, that of all adapters together; the other is made for each by itself.
    right = sum(_qr(shape[1], rank) for rank in ranks) if space == "knots" else _qr(shape[1], total)
    return 2 * (_qr(shape[0], total) + right) + SVD_FLOPS * float(total) * min(total, *shape) ** 2


def summed(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """A product of stacked factors."""
    return _product(shape, sum(ranks))


def entries(each: float = ELECTED, pair: float = 0) -> Work:
    """A rule over entries of the deltas, or over their coordinates in a basis.

    Args:
        each: operations of one entry and adapter.
        pair: of one entry and each pair of adapters.
    """
    return partial(_entries, each=each, pair=pair)


def pruned(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """Factors with thresholds of their own, multiplied."""
    return _product(shape, sum(ranks)) + PRUNED * sum(ranks) * sum(shape)


def truncated(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """QR of both stacks and an SVD; the rank that is asked for is taken to be an adapter's."""
    total = sum(ranks)
    small = SVD_FLOPS * float(min(total, *shape)) ** 3
    return _qr(shape[0], total) + _qr(shape[1], total) + small + _product(shape, max(ranks, default=0))


def combined(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """The KnOTS basis of all adapters, their coordinates added up, and a product of all its directions."""
    total, kept = sum(ranks), min(sum(ranks), shape[0])
    basis = _qr(shape[0], total) + sum(_qr(shape[1], rank) for rank in ranks)
    small = SVD_FLOPS * float(total) * kept**2
    return basis + small + _product((total, shape[1]), kept) + _product(shape, kept)


def solved(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """QR of one of the stacks, a pseudo-inverse, and a result of all ranks."""
    total = sum(ranks)
    pseudo_inverse = SVD_FLOPS * float(total) * min(total, shape[1]) ** 2
    return _qr(shape[1], total) + pseudo_inverse + _product(shape, total)


def regressed(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """A Gram matrix of each adapter added and multiplied, a Cholesky factor, and two triangular solves."""
    total, squared = sum(ranks), float(shape[1]) ** 2
    solved = REGRESSED * squared * (2 * PRODUCT_FLOPS * total + shape[1] / 3)
    return solved + GATHERED * len(ranks) * squared + _product(shape, total)


def clustered(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """Pairs of columns compared with each other; the result has the rank of the largest adapter."""
    return PAIRED * float(sum(ranks)) ** 2 * sum(shape) + _product(shape, max(ranks, default=0))


def filtered(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """A sum, and the Fourier transform of its frequencies that are removed."""
    return _product(shape, sum(ranks)) + (FILTERED + FILTERED_SIDE * min(shape)) * shape[0] * shape[1]


def spectral(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """Bases of Core Space whatever the space is called, and a few SVDs of (R, R) matrices."""
    return _of_core(shape, ranks, SPECTRAL_SVDS)


def spectral_each(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """The same with one SVD for each adapter."""
    return _of_core(shape, ranks, len(ranks))


def _entries(space: str, shape: tuple[int, int], ranks: Sequence[int], *, each: float, pair: float) -> float:
    total, n_adapters = sum(ranks), len(ranks)
    of_entry = each * n_adapters + pair * n_adapters**2
    if space == "dense":
        return made(space, shape, ranks) + of_entry * shape[0] * shape[1]
    rows, columns = min(total, shape[0]), shape[1] if space == "knots" else min(total, shape[1])
    rule = FLOAT64 * of_entry * rows * columns
    return made(space, shape, ranks) + rule + _product(shape, min(total, *shape))


def _of_core(shape: tuple[int, int], ranks: Sequence[int], n_svds: int) -> float:
    small = min(sum(ranks), *shape)
    return made("core", shape, ranks) + n_svds * SVD_FLOPS * float(small) ** 3 + _product(shape, small)


def _qr(side: int, rank: int) -> float:
    return QR_FLOPS * float(rank) * min(rank, side) * side


def _product(shape: tuple[int, int], rank: int) -> float:
    return float(PRODUCT_FLOPS * shape[0] * shape[1] * rank)
