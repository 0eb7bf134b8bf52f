"""OSRM: the rows of A that the other tasks' features hardly reach.

Owns: the directions, the row norm that they start training with, and the projection of a finished adapter onto
them. Reads moments only, never tokens.
Formula: OSRM (arXiv 2505.22934): min |A H^T|_F over A A^T = 1, solved by the eigenvectors of the r smallest
eigenvalues of the others' H^T H; every task's is divided by its own count, then averaged with equal weights.
The published code (github.com/illidanlab/OSRM at bfe8b6d) takes the null space of the others' mean vectors instead:
`mode="means"`.

Where the null space has more than r dimensions, the objective does not choose. LAPACK would return whatever its
last reflections leave, which is nearly the same A for every task; r directions are drawn uniformly from the null space
by a seed instead, so they are a function of the null space and not of rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ray_merge.algebra.moments import Moments
from ray_merge.algebra.sketch import SketchedMoments
from ray_merge.algebra.truncate import numerical_rank

Mode = Literal["covariance", "means"]
RowScale = Literal["orthonormal", "peft"]

PEFT_ROW_NORM = 3**-0.5
"""Root mean square norm of a row of PEFT's default A: kaiming_uniform_(a=sqrt(5)) draws from U(-b, b), b = 1/sqrt(I),
whose variance is 1/(3 I)."""

SALT = 0x6F73726D
"""Added to seeds: features made from torch.randn with the seed 0, as in a first trial, would else be the very numbers
that are drawn here, and leave nothing outside their span."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OsrmDirections:
    """Rows to start an adapter's A with.

    Args:
        A_RI: (R, I) float32, orthonormal rows; the least reached first where eigenvalues decide.
        eigenvalues: (R,) float64, ascending: mean over the others of the mean over their tokens of (a h)^2; in
            mode "means" of (a mean)^2. In the numerical null space exactly 0, or `error` with sketches.
        tail: their sum, the least that R orthonormal rows can have.
        null: how many of the R rows lie in the numerical null space of the others' features.
        null_space: its dimension; which of its directions were taken is arbitrary where it is above R.
        error: bound on the error of every eigenvalue from sketched moments; 0 for exact ones. With sketches, "null"
            means that the sketches hold nothing there.
    """

    A_RI: Tensor
    eigenvalues: Tensor
    tail: float
    null: int
    null_space: int
    error: float


def osrm_directions(
    others: Sequence[Moments | SketchedMoments], r: int, *, mode: Mode, seed: int = 0
) -> OsrmDirections:
    """The r orthonormal rows that the features of the other tasks reach least.

    Args:
        others: moments of the same site, one for each other task.
        r: rows.
        mode: "covariance" (the paper) or "means" (the published code).
        seed: of the choice inside a null space of more than r dimensions; give every task another one, or all
            tasks whose null spaces are nearly the same start from nearly the same A.

    Raises:
        ValueError: no other task, one without tokens, different numbers of columns, or r outside 1 to I.
    """
    n_columns = _checked(others, r)
    if mode == "means":
        rows_KI = torch.stack([other.mean.double() for other in others]) / len(others) ** 0.5
        return _from_rows(rows_KI, r, seed, 0.0)
    error = sum(other.gram_error / other.count for other in others if isinstance(other, SketchedMoments))
    error /= len(others)
    sketches = [
        _mean_rows(other) / len(others) ** 0.5 for other in others if isinstance(other, SketchedMoments)
    ]
    if len(sketches) == len(others) and sum(map(len, sketches)) + r <= n_columns:
        return _from_rows(torch.cat(sketches), r, seed, error)
    # Every sketch is left without half of its shrinkage on the diagonal here: that moves all eigenvalues alike.
    mean_II = torch.zeros(n_columns, n_columns, dtype=torch.float64)
    for rows_LI in sketches:
        mean_II.addmm_(rows_LI.T, rows_LI)
    for other in others:
        if isinstance(other, Moments):
            mean_II.add_(other.gram.double(), alpha=1.0 / (other.count * len(others)))
    values_I, vectors = torch.linalg.eigh(mean_II)
    return _lowest(values_I, vectors.T, r, seed, error)


def _checked(others: Sequence[Moments | SketchedMoments], r: int) -> int:
    columns = [other.n_columns for other in others]
    if not others or columns.count(columns[0]) < len(columns):
        raise ValueError(
            f"OSRM takes moments of at least one other task, all of the same columns, got {columns}"
        )
    for index, other in enumerate(others):
        if other.count < 1:
            raise ValueError(
                f"the moments of other task {index} hold no token rows; give it data or leave it out"
            )
    if not 1 <= r <= columns[0]:
        raise ValueError(
            f"{r} orthonormal rows of {columns[0]} columns were asked for; r is 1 to {columns[0]}"
        )
    return columns[0]


def _mean_rows(sketched: SketchedMoments) -> Tensor:
    """(L, I) float64 rows whose Gram matrix is the sketched one divided by the count."""
    rows_LI: Tensor = sketched.sketch.double() / sketched.count**0.5
    return rows_LI


def _from_rows(Y_KI: Tensor, r: int, seed: int, error: float) -> OsrmDirections:
    """The directions for the Gram matrix Y^T Y, without it where its null space is large enough."""
    _, s_K, Vt_KI = torch.linalg.svd(Y_KI, full_matrices=False)
    rank, n_columns = numerical_rank(s_K), Y_KI.shape[1]
    if n_columns - rank >= r:
        drawn_RI = _orthonormal(_outside(_gaussian(r, n_columns, seed), Vt_KI[:rank]))
        return _directions(drawn_RI, torch.zeros(r, dtype=torch.float64), n_columns - rank, error)
    _, s_K, Vt_II = torch.linalg.svd(Y_KI, full_matrices=True)
    values_I = torch.zeros(n_columns, dtype=torch.float64)
    values_I[:rank] = s_K[:rank].square()
    return _lowest(values_I.flip(0), Vt_II.flip(0), r, seed, error)


def _lowest(values_I: Tensor, vectors_II: Tensor, r: int, seed: int, error: float) -> OsrmDirections:
    """The directions from all eigenvalues, ascending, and the eigenvectors as rows."""
    floor = len(values_I) * torch.finfo(values_I.dtype).eps * float(values_I[-1])
    null_space = int((values_I <= max(floor, 0.0)).sum())
    values_R = torch.where(torch.arange(r) < null_space, 0.0, values_I[:r])
    if null_space <= r:
        return _directions(vectors_II[:r], values_R, null_space, error)
    null_KI = vectors_II[:null_space]
    drawn_RI = _orthonormal(_gaussian(r, len(values_I), seed) @ null_KI.T @ null_KI)
    return _directions(drawn_RI, values_R, null_space, error)


def _directions(A_RI: Tensor, values_R: Tensor, null_space: int, error: float) -> OsrmDirections:
    largest_R = A_RI.abs().argmax(dim=1, keepdim=True)
    signed_RI = A_RI * A_RI.gather(1, largest_R).sign()
    values_R = values_R + error
    return OsrmDirections(
        A_RI=signed_RI.float(),
        eigenvalues=values_R,
        tail=float(values_R.sum()),
        null=min(null_space, len(A_RI)),
        null_space=null_space,
        error=error,
    )


def _gaussian(r: int, n_columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(SALT + seed)
    return torch.randn(r, n_columns, generator=generator, dtype=torch.float64)


def _outside(X_RI: Tensor, basis_KI: Tensor) -> Tensor:
    """X without its part in the span of orthonormal rows; twice, because once leaves rounding of the removed part."""
    for _ in range(2):
        X_RI = X_RI - X_RI @ basis_KI.T @ basis_KI
    return X_RI


def _orthonormal(X_RI: Tensor) -> Tensor:
    Q_IR: Tensor = torch.linalg.qr(X_RI.T)[0]
    return Q_IR.T


def scaled_rows(A_RI: Tensor, row_scale: RowScale) -> Tensor:
    """Orthonormal rows at the norm that training starts from.

    Args:
        A_RI: (R, I), orthonormal rows.
        row_scale: "orthonormal" leaves the norm at 1, as OSRM does; "peft" gives every row the root mean square norm
            of PEFT's default, 1/sqrt(3), so that a comparison with it does not compare norms.
    """
    return A_RI * PEFT_ROW_NORM if row_scale == "peft" else A_RI


def osrm_project(
    B_OR: Tensor,
    A_RI: Tensor,
    scale: float,
    others: Sequence[Moments | SketchedMoments],
    r: int,
    *,
    mode: Mode,
    seed: int = 0,
    new_scale: float | None = None,
) -> tuple[Tensor, Tensor, float]:
    """An adapter that is already trained, projected onto OSRM's rows for the other tasks.

    The published post_OSRM.py sets B' = dW A'^+ although dW has the scale in it and PEFT multiplies by the
    scale again; here the scale is divided out, so that new_scale B' A' is dW projected onto the rows of A'.

    Args:
        B_OR: (O, R), any floating dtype.
        A_RI: (R, I).
        scale: of the adapter.
        others: moments of the same site, one for each other task.
        r: rank of the projected adapter.
        mode: as for `osrm_directions`.
        seed: as for `osrm_directions`.
        new_scale: that the projected adapter will be used with; default `scale`.

    Returns:
        B' (O, r) float32 (float64 if B is), A' (r, I) float32, and what was lost: the Frobenius norm of
        dW - dW A'^+ A' over that of dW, 0 for an update of zero.

    Raises:
        ValueError: as `osrm_directions`, or a new scale of zero.
    """
    target = scale if new_scale is None else new_scale
    directions_RI = osrm_directions(others, r, mode=mode, seed=seed).A_RI
    B_new, lost = project_onto(B_OR, A_RI, scale, directions_RI, new_scale=target)
    return B_new, directions_RI, lost


def project_onto(
    B_OR: Tensor, A_RI: Tensor, scale: float, rows_RI: Tensor, *, new_scale: float
) -> tuple[Tensor, float]:
    """The update scale B A on given orthonormal rows: B' = dW A'^+ / new_scale, as in `osrm_project`.

    Args:
        B_OR: (O, R), any floating dtype.
        A_RI: (R, I).
        scale: of the adapter.
        rows_RI: A' (r, I), orthonormal.
        new_scale: that B' will be multiplied by.

    Returns:
        B' (O, r) float32 (float64 if B is), and what was lost, as in `osrm_project`.

    Raises:
        ValueError: a new scale of zero.
    """
    if new_scale == 0.0:
        raise ValueError(f"an update of scale {scale} cannot be written with the new scale {new_scale}")
    exact_RI = rows_RI.double()
    inside_RI = A_RI.double() @ torch.linalg.pinv(exact_RI)
    B_new = B_OR.double() @ inside_RI * (scale / new_scale)
    T_RR = torch.linalg.qr(B_OR.double())[1]
    whole = float((T_RR @ A_RI.double()).norm())
    lost = float((T_RR @ (A_RI.double() - inside_RI @ exact_RI)).norm())
    dtype = torch.float64 if B_OR.dtype == torch.float64 else torch.float32
    return B_new.to(dtype), lost / whole if whole else 0.0
