"""WUDI-Merging in closed form: the update that interferes least with every adapter's own inputs.

Formula: arXiv 2503.08099, min_tau L(tau) = sum_i |(tau - tau_i) tau_i^T|_F^2 / |tau_i|_F^2, started from sum_i tau_i.
The rows of an adapter's delta stand for its inputs: (tau - tau_i) tau_i^T is what the merge does wrong on them.

The authors and fusion_bench run 300 steps of Adam per matrix. The gradient is sum_i w_i (tau - tau_i) tau_i^T tau_i,
w_i = 1 / |tau_i|^2: gradient descent never leaves the row space of the stacked deltas, where the start lies too, so its
limit is the minimiser in that space, which is unique: tau = N H^+ with H = sum_i w_i tau_i^T tau_i and
N = sum_i w_i tau_i tau_i^T tau_i. Here it is the least squares problem tau L^T = Y that has these normal equations,
solved without squaring the condition number: with the stacked A^T = Q T and B_i = U_i R_i, L stacks
sqrt(w_i) R_i T_i^T.

The minimum interpolates: where ranks fit into I, tau does exactly what tau_i does on the rows of A_i, for every i. Rows
that are nearly the same in two adapters (one initial A, little training) then make it large; 300 steps do not get
that far. `ridge` adds ridge |tau - sum_i tau_i|^2, which leaves such directions at the sum; H has trace T, so 0.01 is
small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_merge.algebra.delta import LowRankDelta
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.catalogue.wudi import Wudi
from ray_merge.methods.context import Context


@dataclass(frozen=True, slots=True)
class _Term:
    """One adapter's part of the objective, in coordinates Q of the common row space.

    Args:
        B_OR: its left factor, in the work dtype.
        C_Rq: its right factor in coordinates, scale and weight folded in.
        L_Pq: sqrt(w_i) R_i C_i, with the Gram matrix of sqrt(w_i) tau_i.
    """

    B_OR: Tensor
    C_Rq: Tensor
    L_Pq: Tensor


def wudi(site: SiteFactors, p: Wudi, context: Context) -> LowRankDelta:
    """The minimiser, as factors of rank sum R_i; an adapter without an update has no say."""
    coefficients = [own * scale for own, scale in zip(p.weight, site.scales, strict=True)]
    A64 = [A_RI.double() * own for A_RI, own in zip(site.A, coefficients, strict=True)]
    Q_Iq, T_qR = torch.linalg.qr(torch.cat(A64).T)
    blocks = T_qR.T.split(list(site.ranks))
    terms = [
        term
        for B_OR, C_Rq in zip(site.B, blocks, strict=True)
        if (term := _term(B_OR, C_Rq, p.compat)) is not None
    ]
    if not terms:
        return LowRankDelta(site.B[0].new_zeros(site.shape[0], 0), site.A[0].new_zeros(0, site.shape[1]))
    solution_Rq = _solve(terms, p.ridge)
    B_OR = torch.cat([term.B_OR for term in terms], dim=1)
    return LowRankDelta(B_OR, (solution_Rq @ Q_Iq.T).to(site.dtype))


def _term(B_OR: Tensor, C_Rq: Tensor, compat: str) -> _Term | None:
    """None where the delta is zero: nothing can interfere with it, and its norm divides."""
    core_Pq = torch.linalg.qr(B_OR.double(), mode="r").R @ C_Rq
    norm = float(core_Pq.norm())
    if norm == 0.0:
        return None
    # sqrt(w_i): 1 / |tau_i| in the paper; the authors' ViT code (vit/coef.py) forgets the square of the norm.
    return _Term(B_OR, C_Rq, core_Pq / (norm if compat == "paper" else norm**0.5))


def _solve(terms: Sequence[_Term], ridge: float) -> Tensor:
    """The right factor, (R, q), of X = Y pinv(L)^T with Y_i = sqrt(w_i) tau_i (R_i C_i)^T = B_i C_i L_i^T.

    A ridge adds the rows sqrt(ridge) to L, and to Y the sum of deltas times that.
    """
    L_Sq, C_Rq = torch.cat([term.L_Pq for term in terms]), torch.cat([term.C_Rq for term in terms])
    root = ridge**0.5
    if root:
        L_Sq = torch.cat([L_Sq, root * torch.eye(L_Sq.shape[1], dtype=L_Sq.dtype, device=L_Sq.device)])
    parts = torch.linalg.pinv(L_Sq).T.split([len(term.L_Pq) for term in terms] + [L_Sq.shape[1]] * bool(root))
    solution_Rq = torch.cat(
        [term.C_Rq @ term.L_Pq.T @ part_Pq for term, part_Pq in zip(terms, parts, strict=False)]
    )
    return solution_Rq + root * C_Rq @ parts[-1] if root else solution_Rq
