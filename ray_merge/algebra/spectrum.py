"""Singular directions of updates, their orthogonalisation, and the way back to factors, in Core Space.

Owns: what is a direction of an update and what is rounding; the polar factor; lifting. Never forms an (O, I)
tensor: with tau = U M V^T and U, V orthonormal, the singular values of M are those of tau and its singular
vectors are U and V times M's, so every spectral rule is a rule over (P, Q) matrices. Float64 throughout.

What is rounding matters here more than elsewhere, because these rules give every kept direction the same
voice. With `precision` the epsilon of the dtype that the factors are held in:

* A singular value is zero up to K * max(precision * largest, 2^-52 * roundoff): K is how many there are, `largest`
  the largest norm among the updates that were added up, `roundoff` the sum of |b_j| |a_j| over columns of B and
  rows of A, which bounds the rounding of their product where it cancels.
* Directions of several updates are one up to an angle of sqrt(precision), and what a projection leaves of an update
  is zero up to that share of it. A singular vector is known to precision * largest / its own value; copies of an
  adapter in other factors differ by that, and an orthogonalisation that took the difference for a direction would
  give it the size of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ray_merge.algebra.bases import CoreBasis
from ray_merge.algebra.delta import LowRankDelta
from ray_merge.algebra.diagnose import ThinSvd, spectral_norm
from ray_merge.algebra.site import SiteFactors

EPSILON = float(torch.finfo(torch.float64).eps)

Pair = tuple[Tensor, Tensor]


def precision_of(site: SiteFactors) -> float:
    """Relative precision of the stored factors; bfloat16 counts as the float32 it is held in."""
    return float(torch.finfo(site.dtype).eps)


def weighted_pairs(site: SiteFactors, weights: Sequence[float]) -> list[Pair]:
    """Per adapter the factors (P, R_i) and (R_i, Q) of weights[i] * M_i, float64."""
    return [
        (left_PR * weight, right_RQ)
        for weight, (left_PR, right_RQ) in zip(weights, site.core.coordinates, strict=True)
    ]


def added(pairs: Sequence[Pair]) -> Pair:
    """Factors (P, R) and (R, Q) of the sum of products."""
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs], dim=0)


def n_directions(site: SiteFactors, space: str) -> int:
    """How many singular values the published code of a spectral method sees.

    Args:
        site: the factors.
        space: dense: min(O, I), those of a dense delta; core: min(O, I, R), those of a core matrix.
    """
    return min(site.shape) if space == "dense" else min(site.core.U_OP.shape[1], site.core.Vt_QI.shape[0])


def directions(pair: Pair, precision: float, *, largest: float = 0.0, most: int | None = None) -> ThinSvd:
    """Singular values and vectors of a product of factors, those that are rounding left out.

    Args:
        pair: (P, R) and (R, Q), float64.
        precision: of the factors, relative.
        largest: norm of the largest update that the product was made of, where it is a sum.
        most: directions returned at most, largest first.
    """
    found, roundoff = _thin_svd(*pair)
    bound = max(precision * max(largest, spectral_norm(found.S_K)), EPSILON * roundoff)
    return _above(len(found.S_K) * bound, found, most)


def directions_outside(pair: Pair, U_PK: Tensor, precision: float, *, whole: float, most: int) -> ThinSvd:
    """Singular values and vectors of (I - U U^T) M, at most `most`.

    Args:
        pair: factors (P, R) and (R, Q) of M, float64.
        U_PK: orthonormal columns.
        precision: of the factors, relative.
        whole: the largest singular value of M.
        most: directions returned at most, largest first.
    """
    left_PR, right_RQ = pair
    rest, _ = _thin_svd(left_PR - U_PK @ (U_PK.T @ left_PR), right_RQ)
    return _above(math.sqrt(precision) * whole, rest, most)


def _thin_svd(left_PR: Tensor, right_RQ: Tensor) -> tuple[ThinSvd, float]:
    """All min(P, Q, R) triplets of a product, and a bound of what its rounding is relative to."""
    Q_PK, T_KR = torch.linalg.qr(left_PR)
    Q_QL, T_LR = torch.linalg.qr(right_RQ.T)
    U_KJ, s_J, Vt_JL = torch.linalg.svd(T_KR @ T_LR.T, full_matrices=False)
    roundoff = float((left_PR.norm(dim=0) * right_RQ.norm(dim=1)).sum())
    return ThinSvd(Q_PK @ U_KJ, s_J, Q_QL @ Vt_JL.T), roundoff


def _above(bound: float, found: ThinSvd, most: int | None) -> ThinSvd:
    s_K = found.S_K
    keep = int((s_K > bound).sum())
    keep = keep if most is None else min(keep, most)
    return ThinSvd(found.U_OK[:, :keep], s_K[:keep], found.V_IK[:, :keep])


def beside(parts: Sequence[ThinSvd]) -> tuple[Tensor, Tensor, Tensor]:
    """[U_1 .. U_T] (P, K), the singular values (K,) and [V_1 .. V_T] (Q, K), K the sum of all."""
    U_PK = torch.cat([part.U_OK for part in parts], dim=1)
    V_QK = torch.cat([part.V_IK for part in parts], dim=1)
    return U_PK, torch.cat([part.S_K for part in parts]), V_QK


def span_rank(M_PK: Tensor, precision: float) -> int:
    """How many dimensions the columns of M span; they have unit length."""
    return _distinct(torch.linalg.svdvals(M_PK), precision)


def polar(M_PK: Tensor, precision: float) -> Tensor:
    """The orthogonal factor of M, whose columns have unit length: the nearest matrix with singular values of 1.

    Where columns are dependent it is the partial isometry on what they span. The full factor that an SVD with
    all its vectors gives is not unique there: it fills the rest with whatever LAPACK returns.
    """
    U_PJ, s_J, Vt_JK = torch.linalg.svd(M_PK, full_matrices=False)
    keep = _distinct(s_J, precision)
    polar_PK: Tensor = U_PJ[:, :keep] @ Vt_JK[:keep]
    return polar_PK


def _distinct(s_J: Tensor, precision: float) -> int:
    return int((s_J > math.sqrt(precision) * spectral_norm(s_J)).sum())


def lift_product(core: CoreBasis, left_PK: Tensor, right_KQ: Tensor, dtype: torch.dtype) -> LowRankDelta:
    """U (left right) V^T as factors of the least of the ranks K, P and Q, rounded to `dtype`."""
    if left_PK.shape[1] > min(left_PK.shape[0], right_KQ.shape[1]):
        return lift(core, left_PK @ right_KQ, dtype)
    return LowRankDelta((core.U_OP @ left_PK).to(dtype), (right_KQ @ core.Vt_QI).to(dtype))


def lift(core: CoreBasis, M_PQ: Tensor, dtype: torch.dtype) -> LowRankDelta:
    """U M V^T as factors, M multiplied into the side that leaves the smaller rank."""
    if M_PQ.shape[0] <= M_PQ.shape[1]:
        return LowRankDelta(core.U_OP.to(dtype), (M_PQ @ core.Vt_QI).to(dtype))
    return LowRankDelta((core.U_OP @ M_PQ).to(dtype), core.Vt_QI.to(dtype))
