"""How many directions a set of adapters spans, and how unevenly directions are used.

Owns: TARA's three effective ranks and the unevenness of activations. Float64.
Formula: TARA (arXiv 2603.26299), erank = exp(entropy of s / sum(s)). A stack of vectorised rank-1 terms s b a^T has the
singular values sqrt(eig((B^T B) o (A A^T))), a problem of the size of the summed ranks; an adapter's delta is the
sum of its terms, so the stack of deltas has the block sums of the same matrix.

The terms depend on how an update is split: (B G, G^-1 A) is the same update with other terms. Here the factors are
taken as the adapter has them, scale folded in, as in the paper. A row that is scaled or repeated moves the figures as
well; they say nothing of accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_merge.algebra.diagnose import effective_rank
from ray_merge.algebra.extreme import largest_eigenvalue
from ray_merge.algebra.moments import Moments
from ray_merge.algebra.sketch import SketchedMoments
from ray_merge.spec import Factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Effective ranks at one site.

    Args:
        by_task: of each adapter's own rank-1 terms.
        deltas: of the stacked deltas; at most the number of adapters.
        terms: of all rank-1 terms of all adapters in one stack.
    """

    by_task: tuple[float, ...]
    deltas: float
    terms: float

    @property
    def separate(self) -> float:
        """Sum over the adapters, each taken alone."""
        return sum(self.by_task)


def coverage(factors: Sequence[Factor]) -> Coverage:
    """TARA's effective ranks of the updates of one site.

    Args:
        factors: one for each adapter; none of DoRA. A rank of 0 counts as an update of zero.

    Raises:
        ValueError: no adapter, or one of DoRA, whose update is not a product of its factors.
        OverflowError: products of the factors are not finite in float64.
    """
    if not factors or any(factor.magnitude is not None for factor in factors):
        raise ValueError(
            f"coverage needs factors of at least one adapter and none of DoRA, got {len(factors)}"
        )
    pairs = [(factor.B.double(), factor.scale * factor.A.double()) for factor in factors]
    products_KK = _term_products(torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs]))
    sizes = [A.shape[0] for _, A in pairs]
    rows = torch.split(products_KK, sizes)
    blocks = [torch.split(row, sizes, dim=1) for row in rows]
    sums_TT = torch.stack([torch.stack([block.sum() for block in row]) for row in blocks])
    return Coverage(
        by_task=tuple(_rank_of_square(row[index]) for index, row in enumerate(blocks)),
        deltas=_rank_of_square(sums_TT),
        terms=_rank_of_square(products_KK),
    )


def _term_products(B_OK: Tensor, A_KI: Tensor) -> Tensor:
    """(K, K): inner products of the terms b a^T."""
    products_KK: Tensor = (B_OK.T @ B_OK) * (A_KI @ A_KI.T)
    if not bool(torch.isfinite(products_KK).all()):
        raise OverflowError("the products of the factors are not finite in float64")
    return products_KK


def _rank_of_square(square: Tensor) -> float:
    """Effective rank of the matrix whose rows have these inner products."""
    if not square.numel():
        return 0.0
    values = torch.linalg.eigvalsh(square).flip(0)
    # The root would make 1e-8 of the largest singular value from an eigenvalue that is rounding.
    floor = float(values[0].clamp(min=0.0)) * len(values) * torch.finfo(values.dtype).eps
    return effective_rank(values[values > floor].sqrt())


@dataclass(frozen=True, slots=True, kw_only=True)
class Anisotropy:
    """How unevenly the inputs of a module fill their space; from the uncentred Gram matrix.

    Args:
        top_share: the largest eigenvalue over their sum: 1/I for an even spectrum, 1 for a single direction.
        directions: participation ratio (sum)^2 / (sum of squares): I for an even spectrum, 1 for a single direction.
    """

    top_share: float
    directions: float


def anisotropy(moments: Moments | SketchedMoments) -> Anisotropy:
    """Unevenness of activations; of a sketch, that of the middle of what its bound allows.

    Raises:
        ValueError: the moments hold no tokens, or nothing but zeros.
    """
    trace, top, squares = _spectrum(moments)
    if moments.count < 1 or trace <= 0.0:
        raise ValueError(
            f"activations have no spectrum: {moments.count} token rows with squares of {trace} in all"
        )
    return Anisotropy(top_share=top / trace, directions=trace * trace / squares)


def _spectrum(moments: Moments | SketchedMoments) -> tuple[float, float, float]:
    """Sum of the eigenvalues of the Gram matrix, the largest of them, and the sum of their squares."""
    if isinstance(moments, Moments):
        gram_II = moments.gram.double()
        return float(gram_II.trace()), largest_eigenvalue(gram_II), float(gram_II.norm()) ** 2
    # S^T S + e 1, whose spectrum is that of the much smaller S S^T, and of zeros, raised by e.
    small_LL = moments.sketch.double() @ moments.sketch.double().T
    raised, n = moments.gram_error, moments.n_columns
    trace, squares = float(small_LL.trace()), float(small_LL.norm()) ** 2
    top = largest_eigenvalue(small_LL) if len(small_LL) else 0.0
    return trace + n * raised, top + raised, squares + 2 * raised * trace + n * raised * raised
