"""What two thin factors say about an update and about a pair of updates, without a dense delta.

Owns: norms, effective rank, angles between subspaces, cosines, interference. Float64 throughout, from one
decomposition of each update: delta = U S V^T by QR of B and of A^T, then an (R, R) SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_merge.algebra.truncate import numerical_rank


@dataclass(frozen=True, slots=True)
class ThinSvd:
    """delta = U diag(S) V^T; K is its rank to float64 rounding, 0 for an update of zero.

    Args:
        U_OK: orthonormal columns: the outputs that the update writes to.
        S_K: singular values, descending, all above zero.
        V_IK: orthonormal columns: the inputs that the update reads.
    """

    U_OK: Tensor
    S_K: Tensor
    V_IK: Tensor


def thin_svd(B_OR: Tensor, A_RI: Tensor) -> ThinSvd:
    """The decomposition of B A.

    Args:
        B_OR: (O, R), any floating dtype.
        A_RI: (R, I), scale folded in.

    Raises:
        OverflowError: the product is not finite in float64.
    """
    Q_OP, T_PR = torch.linalg.qr(B_OR.double())
    Q_IQ, T_QR = torch.linalg.qr(A_RI.double().T)
    core_PQ = T_PR @ T_QR.T
    if not bool(torch.isfinite(core_PQ).all()):
        raise OverflowError("the product of the factors is not finite in float64")
    U_PK, s_K, Vt_KQ = torch.linalg.svd(core_PQ, full_matrices=False)
    keep = numerical_rank(s_K)
    return ThinSvd(Q_OP @ U_PK[:, :keep], s_K[:keep], Q_IQ @ Vt_KQ[:keep].T)


def spectral_norm(s_K: Tensor) -> float:
    """The largest singular value."""
    return float(s_K[0]) if s_K.numel() else 0.0


def frobenius_norm(s_K: Tensor) -> float:
    """Root of the sum of squares, divided by the largest first so that nothing overflows."""
    largest = spectral_norm(s_K)
    return largest * float((s_K / largest).norm()) if largest else 0.0


def effective_rank(s_K: Tensor) -> float:
    """The exponential of the entropy of s / sum(s): between 1 and K; 0 for an update of zero.

    Roy and Vetterli (EUSIPCO 2007); TARA (arXiv 2603.26299) reports it too.
    """
    if not s_K.numel():
        return 0.0
    s_K = s_K / s_K[0]
    share_K = s_K / s_K.sum()
    return float(torch.exp(torch.special.entr(share_K).sum()))


def overlap(one_NK: Tensor, other_NL: Tensor) -> float | None:
    """Mean squared cosine of the principal angles between two subspaces; None where one is empty.

    ||Q1^T Q2||_F^2 / min(K, L) for orthonormal columns: 1 where one holds the other, 0 where they are
    orthogonal. The subspace similarity of LoRA's paper (arXiv 2106.09685, section 7.2).
    """
    least = min(one_NK.shape[1], other_NL.shape[1])
    if not least:
        return None
    return float((one_NK.T @ other_NL).square().sum()) / least


def chance_overlap(one_NK: Tensor, other_NL: Tensor) -> float | None:
    """What `overlap` is on average where one of the subspaces is random: max(K, L) / N."""
    sizes = (one_NK.shape[1], other_NL.shape[1])
    return max(sizes) / one_NK.shape[0] if min(sizes) else None


def inner_product(one: ThinSvd, other: ThinSvd) -> float:
    """<delta1, delta2> = trace(delta1^T delta2) = sum of (S1 U1^T U2 S2) * (V1^T V2)."""
    left_KL = one.S_K[:, None] * (one.U_OK.T @ other.U_OK) * other.S_K
    return float((left_KL * (one.V_IK.T @ other.V_IK)).sum())


def norm_on_inputs_of(one: ThinSvd, other: ThinSvd) -> float:
    """||delta1 P2||_F, P2 = V2 V2^T the projection on the inputs that `other` reads: ||S1 V1^T V2||_F.

    OSRM (arXiv 2505.22934) makes A1 H2^T small for inputs H2 of the other task. Without data, the row space of
    the other's own A stands for its inputs.
    """
    return float((one.S_K[:, None] * (one.V_IK.T @ other.V_IK)).norm())
