"""Truncated SVD of B A without the product.

Owns: the reduced factors and what they lose. Float64 throughout: QR of B and of A^T, then an (R, R) SVD,
whose singular values are those of the (O, I) product.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncate(
    B_OR: Tensor, A_RI: Tensor, *, rank: int | None = None, tolerance: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A of a given rank, or of the least rank within a tolerance.

    Args:
        B_OR: (O, R).
        A_RI: (R, I).
        rank: singular values kept at most.
        tolerance: relative Frobenius error allowed at most.

    Returns:
        B' (O, K) = U S and A' (K, I) = V^T in the dtype of B, and the relative Frobenius error, 0 where
        B A is zero. Singular values that are zero to float64 rounding are dropped.

    Raises:
        ValueError: neither or both of rank and tolerance, or one that is out of range.
    """
    if (rank is None) == (tolerance is None):
        raise ValueError(f"give rank or tolerance, got rank={rank} tolerance={tolerance}")
    if (rank is not None and rank < 1) or (tolerance is not None and not 0 <= tolerance < 1):
        raise ValueError(f"rank must be at least 1 and tolerance in [0, 1), got {rank=} {tolerance=}")
    Q_OB, R_BR = torch.linalg.qr(B_OR.double())
    Q_IA, R_AR = torch.linalg.qr(A_RI.double().T)
    U_BK, s_K, Vt_KA = torch.linalg.svd(R_BR @ R_AR.T, full_matrices=False)
    numerical = numerical_rank(s_K)
    tails = tail_norms(s_K)
    keep = min(rank, numerical) if rank is not None else _least_rank(tails, tolerance or 0.0, numerical)
    error = float(tails[keep] / tails[0]) if numerical else 0.0
    B_OK = Q_OB @ (U_BK[:, :keep] * s_K[:keep])
    A_KI = Vt_KA[:keep] @ Q_IA.T
    return B_OK.to(B_OR.dtype), A_KI.to(B_OR.dtype), 0.0 if keep == numerical else error


def tail_norms(s_K: Tensor) -> Tensor:
    """(K + 1): entry k is the Frobenius norm of what is lost when k singular values are kept."""
    squared = torch.cat([s_K.square(), s_K.new_zeros(1)])
    return squared.flip(0).cumsum(0).flip(0).sqrt()


def numerical_rank(s_K: Tensor) -> int:
    """How many singular values (descending) are more than rounding."""
    if s_K.numel() == 0 or float(s_K[0]) == 0.0:
        return 0
    return int((s_K > s_K[0] * len(s_K) * torch.finfo(s_K.dtype).eps).sum())


def _least_rank(tails: Tensor, tolerance: float, numerical: int) -> int:
    within = torch.nonzero(tails <= tolerance * tails[0])
    return min(int(within[0]), numerical)
