"""What learning minimises, as pure functions: entropies, their scalarisation, null-space ratios, effective rank.

Sources: TARA (arXiv 2603.26299), AdaMerging (arXiv 2310.02575), NSC (arXiv 2603.26317); the diversity term is that of
information maximisation (SHOT, arXiv 2002.08546). Legend: N predictions or tokens, C classes, T tasks, K coefficients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDING = 1e-12
"""Eigenvalues of A A^T below this share of the largest are those of rows that depend on each other; a singular value
below this share of their sum counts as 0."""

FLOOR = 1e-12
"""Of omega^2: the slope of its root stays finite where an activation lies in the row space."""


def entropy(logits: Tensor) -> Tensor:
    """H(p) in nats of softmax(logits) over the last axis; (..., C) -> (...)."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


def information(logits_NC: Tensor, *, diversity: float = 0.0, normalise: bool = False) -> Tensor:
    """mean_x H(p_x) - diversity * H(mean_x p_x), a scalar.

    The second term is the entropy of the predicted classes' shares; it keeps a batch from collapsing into one class.

    Args:
        logits_NC: (N, C), N >= 1.
        diversity: its weight; 0 for the papers' mean entropy.
        normalise: divide by ln C, so that tasks of few and of many classes have one scale.

    Raises:
        ValueError: fewer than two classes, which have no entropy.
    """
    n_classes = logits_NC.shape[-1]
    if n_classes < 2:
        raise ValueError(f"{n_classes} class(es) have no entropy")
    logp_NC = torch.log_softmax(logits_NC, dim=-1)
    value = -(logp_NC.exp() * logp_NC).sum(dim=-1).mean()
    if diversity:
        logq_C = torch.logsumexp(logp_NC, dim=0) - math.log(len(logp_NC))
        value = value + diversity * (logq_C.exp() * logq_C).sum()
    return value / math.log(n_classes) if normalise else value


def divergence(logits_NC: Tensor, own_NC: Tensor, *, normalise: bool = False) -> Tensor:
    """mean_x KL(q_x || p_x), a scalar; 0 where the merged model predicts what the task's own adapter predicts.

    It is the entropy of q's predictions under p less that of q itself: TARA's f_i - z_i with the cross-entropy to the
    single adapter in place of the entropy.

    Args:
        logits_NC: of p, the merged model.
        own_NC: log q, of the own adapter.
        normalise: divide by ln C.

    Raises:
        ValueError: fewer than two classes.
    """
    n_classes = logits_NC.shape[-1]
    if n_classes < 2:
        raise ValueError(f"{n_classes} class(es) have no entropy")
    logp_NC = torch.log_softmax(logits_NC, dim=-1)
    value = (own_NC.exp() * (own_NC - logp_NC)).sum(dim=-1).mean()
    return value / math.log(n_classes) if normalise else value


def tchebycheff(
    values_T: Tensor, preference_T: Tensor, anchors_T: Tensor, *, alpha: float, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """Alpha log sum_i exp(rho_i (f_i - z_i) / alpha), and its derivative with respect to each f_i; float64.

    The paper has |f_i - z_i|, its code does not; `absolute` is the paper's. Stable for any alpha > 0.
    """
    gaps_T = values_T.double() - anchors_T.double()
    signs_T = torch.where(gaps_T < 0, -1.0, 1.0).double() if absolute else torch.ones_like(gaps_T)
    scaled_T = preference_T.double() * gaps_T * signs_T / alpha
    weights_T = preference_T.double() * signs_T * torch.softmax(scaled_T, dim=0)
    return alpha * torch.logsumexp(scaled_T, dim=0), weights_T


def linear(values_T: Tensor, preference_T: Tensor, anchors_T: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i rho_i (f_i - z_i), and its derivative rho; float64."""
    weights_T = preference_T.double()
    return (weights_T * (values_T.double() - anchors_T.double())).sum(), weights_T


def row_basis(A_RI: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of A, (R', I) float64; R' is the rank of A.

    L^-1 A with A A^T = L L^T (Fast NSC's cached inverse, in a form that gives squared norms directly); where rows
    depend on each other, from the eigenvectors of A A^T. A multiple of A, or G A, spans the same.
    """
    A64_RI = A_RI.double()
    if not len(A64_RI):
        return A64_RI
    norms_R = A64_RI.norm(dim=1, keepdim=True)
    A64_RI = A64_RI / torch.where(norms_R > 0, norms_R, 1.0)  # rows of very different lengths
    gram_RR = A64_RI @ A64_RI.T
    values_R, vectors_RR = torch.linalg.eigh(gram_RR)
    kept = values_R > ROUNDING * values_R.max().clamp(min=torch.finfo(torch.float64).tiny)
    spanned_RI = (vectors_RR[:, kept] / values_R[kept].sqrt()).T @ A64_RI
    first_RI = _orthonormal(A64_RI) if bool(kept.all()) else spanned_RI
    return _orthonormal(first_RI)  # where A A^T is near singular, the first pass leaves errors of up to 1e-4


def _orthonormal(A_RI: Tensor) -> Tensor:
    factor_RR = torch.linalg.cholesky(A_RI @ A_RI.T)
    rows_RI: Tensor = torch.linalg.solve_triangular(factor_RR, A_RI, upper=False)
    return rows_RI


def null_space_ratio(Z_NI: Tensor, basis_RI: Tensor) -> Tensor:
    """omega(z) = |projection of z onto the null space of A| / |z|, (N,).

    sqrt(1 - |W z|^2 / |z|^2) with W the rows of `row_basis`, clamped to [FLOOR, 1] before the root, so gradients are
    finite; a z of zero has omega 1 and no gradient.
    """
    squared_N = Z_NI.square().sum(dim=-1)
    there_N = squared_N > 0
    inside_N = (Z_NI @ basis_RI.T).square().sum(dim=-1)
    share_N = torch.where(there_N, inside_N / torch.where(there_N, squared_N, 1.0), 0.0)
    return (1 - share_N).clamp(min=FLOOR).sqrt()


def effective_rank(B_OP: Tensor, A_PI: Tensor) -> Tensor:
    """exp(-sum_k p_k ln p_k), p_k = sigma_k / sum sigma, of B A; differentiable once, by a (P, P) problem.

    To first order a singular value changes with its vectors held, which needs no derivative of a QR: gradients are
    finite where coefficients or factors are 0. The rank of a zero update, or of nothing, is 1.
    """
    B64_OP, A64_PI = B_OP.double(), A_PI.double()
    with torch.no_grad():
        Q_OK, R_B = torch.linalg.qr(B64_OP)
        Q_IK, R_A = torch.linalg.qr(A64_PI.T)
        U_KK, _, Vt_KK = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        left_KO, right_IK = (Q_OK @ U_KK).T, Q_IK @ Vt_KK.T
    s_K = ((left_KO @ B64_OP) * (A64_PI @ right_IK).T).sum(dim=1)
    p_K = s_K / s_K.sum().clamp(min=torch.finfo(torch.float64).tiny)
    there_K = torch.where(p_K > ROUNDING, p_K, 1.0)
    return torch.exp(-(there_K * there_K.log()).sum())


def rank_penalty(B_OP: Tensor, A_PI: Tensor) -> Tensor:
    """1 - erank(B A) / min(O, P, I).

    TARA's regulariser; the authors divide by the number of coefficients, which for the shared form is T times what any
    rank can reach. 0 for no directions.
    """
    if not B_OP.shape[1]:
        return A_PI.double().sum()  # 0, with a gradient for whoever asks
    return 1 - effective_rank(B_OP, A_PI) / min(B_OP.shape[0], B_OP.shape[1], A_PI.shape[1])


def condition_number(J_TK: Tensor) -> Tensor:
    """kappa(J): largest over smallest singular value of the tasks' gradients of phi; inf where they depend."""
    s_T: Tensor = torch.linalg.svdvals(J_TK.double())
    ratio: Tensor = s_T.max() / s_T.min()
    return ratio


def misalignment(J_TK: Tensor) -> Tensor:
    """The angle xi between preferences for one task each: 1 - |cos(J_i, J_j)|, (T, T), 0 on the diagonal."""
    J64_TK = J_TK.double()
    unit_TK = J64_TK / J64_TK.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    apart_TT: Tensor = 1 - (unit_TK @ unit_TK.T).abs()
    return apart_TT
