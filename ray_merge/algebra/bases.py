"""Common bases of several deltas, from their factors: KnOTS and Core Space.

Owns: the decompositions, float64, by QR of tall factors and an SVD of an (R, R) matrix. The stacked dense
deltas are never formed. Formulas: KnOTS (arXiv 2410.19735) takes the SVD of [tau_1 .. tau_T]; Core Space
(arXiv 2509.17786) takes left singular vectors of [B_1 .. B_T] and right ones of the stacked A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SMALLEST_SINGULAR_VALUE = 1e-5
"""Directions at or below it are dropped. Absolute, not relative to the largest, as the KnOTS authors have it:
an update whose every singular value is below it merges to zero."""


@dataclass(frozen=True)
class KnotsBasis:
    """[tau_1 .. tau_T] = U S [V_1 .. V_T]; R is the number of directions kept.

    Args:
        S_R: singular values, descending.
        coordinates: per adapter the factors (R, q_i) and (q_i, I) of S V_i.
        reflectors: Householder vectors (O, P) and their factors (P,), the product of which is Q.
        W_PR: U = Q W.
    """

    S_R: Tensor
    coordinates: tuple[tuple[Tensor, Tensor], ...]
    reflectors: tuple[Tensor, Tensor]
    W_PR: Tensor

    @cached_property
    def left_vectors(self) -> Tensor:
        """U, (O, R), orthonormal columns.

        Half the work of the basis, and asked for by whoever lifts coordinates, not by whoever compares them.
        """
        U_OR: Tensor = torch.linalg.householder_product(*self.reflectors) @ self.W_PR
        return U_OR


@dataclass(frozen=True, slots=True)
class CoreBasis:
    """M_i = U^T tau_i V, so that tau_i = U M_i V^T exactly.

    Args:
        U_OP: orthonormal columns, P = min(O, R).
        Vt_QI: orthonormal rows, Q = min(I, R).
        coordinates: per adapter the factors (P, R_i) and (R_i, Q) of M_i.
    """

    U_OP: Tensor
    Vt_QI: Tensor
    coordinates: tuple[tuple[Tensor, Tensor], ...]


def knots_basis(
    pairs: Sequence[tuple[Tensor, Tensor]], smallest: float | None = SMALLEST_SINGULAR_VALUE
) -> KnotsBasis:
    """The KnOTS basis of the deltas B_i A_i.

    Args:
        pairs: per adapter B_i (O, R_i) and A_i (R_i, I), scale folded in; R_i may be 0.
        smallest: singular values up to it are dropped; None keeps min(O, sum of ranks) directions whatever they are.
    """
    lefts, rights = [], []
    for B_OR, A_RI in pairs:
        # B A = (B T^T) Q^T with A^T = Q T. Q^T has orthonormal rows: the stack has the lefts' SVD.
        Q_Iq, T_qR = torch.linalg.qr(A_RI.double().T)
        lefts.append(B_OR.double() @ T_qR.T)
        rights.append(Q_Iq.T)
    stacked_OS = torch.cat(lefts, dim=1)
    n_directions = min(stacked_OS.shape)
    packed_OS, tau_P = torch.geqrf(stacked_OS)  # R above the diagonal, the vectors that make up Q below it
    U_PK, s_K, Vt_KS = torch.linalg.svd(packed_OS[:n_directions].triu(), full_matrices=False)
    keep = len(s_K) if smallest is None else int((s_K > smallest).sum())
    s_R = s_K[:keep]
    blocks = torch.split(s_R[:, None] * Vt_KS[:keep], [left.shape[1] for left in lefts], dim=1)
    coordinates = tuple(zip(blocks, rights, strict=True))
    return KnotsBasis(s_R, coordinates, (packed_OS[:, :n_directions], tau_P), U_PK[:, :keep])


def core_basis(B: Sequence[Tensor], A: Sequence[Tensor], scales: Sequence[float]) -> CoreBasis:
    """The Core Space of several adapters.

    Args:
        B: per adapter (O, R_i); R_i may be 0.
        A: per adapter (R_i, I).
        scales: per adapter; they enter M_i, not the bases, as in the paper.
    """
    B64 = [B_OR.double() for B_OR in B]
    A64 = [A_RI.double() for A_RI in A]
    U_OP = _left_vectors(torch.cat(B64, dim=1))
    V_IQ = _left_vectors(torch.cat(A64, dim=0).T)
    coordinates = tuple(
        (U_OP.T @ B_OR * scale, A_RI @ V_IQ) for B_OR, A_RI, scale in zip(B64, A64, scales, strict=True)
    )
    return CoreBasis(U_OP, V_IQ.T.contiguous(), coordinates)


def _left_vectors(M_OR: Tensor) -> Tensor:
    Q_OP, T_PR = torch.linalg.qr(M_OR)
    left_PP: Tensor = torch.linalg.svd(T_PR, full_matrices=False).U
    U_OP: Tensor = Q_OP @ left_PP
    return U_OP
