"""Frequent directions: a Gram matrix of I columns in L rows, with a bound on what it lost.

Owns: the buffer of 2 L rows and its shrinking. A sketch S of rows X obeys 0 <= X^T X - S^T S <= shrinkage (as
matrices), and shrinkage <= |X - X_k|_F^2 / (L + 1 - k) for every k <= L, X_k being the best approximation of rank k.
Formula: Ghashami, Liberty, Phillips, Woodruff (arXiv 1501.01711), the variant that shrinks a buffer of twice the rows.
Nothing is random, and the sketch depends on the rows and their order alone, not on how they were divided over calls.
A shrink takes an eigendecomposition of (2 L, 2 L) for every L rows. It is worth it where (I, I) does not fit: with
L = 256 it takes 6 times the time of the exact sums for I = 1024 and the same for I = 4096, in an eighth of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_merge.algebra.moments import Moments


@dataclass(frozen=True, slots=True, eq=False)
class SketchedMoments:
    """Moments whose Gram matrix is known to within `gram_error`; takes the place of `Moments`.

    Args:
        sketch: (L, I) float64, S.
        shrinkage: float, in units of the Gram matrix: 0 <= X^T X - S^T S <= shrinkage, in the 2-norm.
        mean: (I,) float64, exact.
        count: token rows.

    Raises:
        ValueError: the shapes do not belong together, or `shrinkage` or `count` is negative.
    """

    sketch: Tensor
    shrinkage: float
    mean: Tensor
    count: int

    def __post_init__(self) -> None:
        fits = self.sketch.ndim == 2 and self.mean.shape == self.sketch.shape[1:]
        if not fits or self.count < 0 or not self.shrinkage >= 0:
            raise ValueError(
                f"a sketch (L, I), a mean (I,), a shrinkage >= 0 and a count >= 0 are taken, but got "
                f"{tuple(self.sketch.shape)}, {tuple(self.mean.shape)}, {self.shrinkage} and {self.count}"
            )

    @property
    def n_columns(self) -> int:
        """Columns of the rows that were summed: I."""
        return self.mean.numel()

    @property
    def gram(self) -> Tensor:
        """(I, I) float64, computed on every use: S^T S + shrinkage / 2, the middle of what the bound allows."""
        gram_II = self.sketch.T @ self.sketch
        gram_II.diagonal().add_(self.gram_error)
        return gram_II

    @property
    def gram_error(self) -> float:
        """Bound on the 2-norm of `gram` minus the true Gram matrix."""
        return self.shrinkage / 2


class FrequentDirections:
    """Running sketch of one module's inputs.

    Args:
        n_columns: I, columns of every row that is added.
        rows: L, rows of the sketch; with L >= I nothing is lost.

    Raises:
        ValueError: less than one row or column.
    """

    def __init__(self, n_columns: int, rows: int) -> None:
        if rows < 1 or n_columns < 1:
            raise ValueError(f"a sketch needs at least 1 row and 1 column, got {rows} and {n_columns}")
        self._rows = rows
        self._buffer_KI = torch.zeros(2 * rows, n_columns, dtype=torch.float64)
        self._used = 0
        self._shrinkage = 0.0
        self._sum_I = torch.zeros(n_columns, dtype=torch.float64)
        self._count = 0

    def add(self, X_NI: Tensor) -> None:
        """Add rows.

        Args:
            X_NI: (N, I), any floating dtype, any device; what is kept is float64 on the CPU. N may be 0.

        Raises:
            ValueError: not a matrix with I columns.
            OverflowError: a sum of squares is not finite, because a row was not or was too large.
        """
        if X_NI.ndim != 2 or X_NI.shape[1] != self._sum_I.numel():
            raise ValueError(
                f"rows of {self._sum_I.numel()} columns are summed here, but got {tuple(X_NI.shape)}"
            )
        self._absorb(X_NI.detach())
        self._sum_I += X_NI.detach().sum(0, dtype=torch.float64).cpu()
        self._count += X_NI.shape[0]

    def add_sketch(self, other: SketchedMoments) -> None:
        """Add what another sketch has seen; the shrinkages add up.

        Raises:
            ValueError: another number of columns.
            OverflowError: a sum of squares is not finite.
        """
        if other.n_columns != self._sum_I.numel():
            raise ValueError(
                f"moments of {self._sum_I.numel()} and of {other.n_columns} columns cannot be added"
            )
        self._absorb(other.sketch)
        self._sum_I += other.count * other.mean.double()
        self._shrinkage += other.shrinkage
        self._count += other.count

    def finish(self) -> SketchedMoments:
        """The sketch of what was added so far: at most L rows, and all of them where fewer were added.

        Raises:
            OverflowError: a sum of squares is not finite.
        """
        if self._used > self._rows:
            self._shrink()
        kept_LI = self._buffer_KI[: self._used].clone()
        _check_finite(kept_LI.square().sum())
        return SketchedMoments(kept_LI, self._shrinkage, self._sum_I / max(self._count, 1), self._count)

    def _absorb(self, X_NI: Tensor) -> None:
        done = 0
        while done < X_NI.shape[0]:
            if self._used == self._buffer_KI.shape[0]:
                self._shrink()
            take = min(X_NI.shape[0] - done, self._buffer_KI.shape[0] - self._used)
            self._buffer_KI[self._used : self._used + take] = X_NI[done : done + take]
            self._used += take
            done += take

    def _shrink(self) -> None:
        kept_LI, loss = _shrunk(self._buffer_KI[: self._used], self._rows)
        self._shrinkage += loss
        self._used = kept_LI.shape[0]
        self._buffer_KI[: self._used] = kept_LI


def _shrunk(Y_KI: Tensor, rows: int) -> tuple[Tensor, float]:
    """At most `rows` rows S with 0 <= Y^T Y - S^T S <= loss, and the loss: the next eigenvalue of Y^T Y.

    Both hold to float64 rounding of the largest eigenvalue.
    """
    wide = Y_KI.shape[0] <= Y_KI.shape[1]
    square = Y_KI @ Y_KI.T if wide else Y_KI.T @ Y_KI
    _check_finite(square.diagonal())
    values, vectors = _largest(square)
    loss = float(values[rows]) if len(values) > rows else 0.0
    # Below this a value is rounding of the largest one, and dividing by its root would blow that up.
    floor = float(values[0]) * len(square) * torch.finfo(values.dtype).eps
    keep = int((values[:rows] > max(loss, floor)).sum())
    values, vectors = values[:keep], vectors[:, :keep]
    rest = (values - loss).sqrt()
    if wide:
        return (rest / values.sqrt())[:, None] * (vectors.T @ Y_KI), loss
    return rest[:, None] * vectors.T, loss


def _largest(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and not below zero, and the eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(square)
    return values.flip(0).clamp(min=0.0), vectors.flip(1)


def _check_finite(squares: Tensor) -> None:
    if not bool(torch.isfinite(squares).all()):
        raise OverflowError("the squares of the token rows are not finite in float64")


def as_sketch(moments: Moments, rows: int) -> SketchedMoments:
    """The best sketch of `rows` rows of a Gram matrix that is known: the shrinkage is its next eigenvalue.

    Raises:
        ValueError: less than one row.
    """
    if rows < 1:
        raise ValueError(f"a sketch needs at least 1 row, got {rows}")
    values, vectors = _largest(moments.gram.double())
    loss = float(values[rows]) if len(values) > rows else 0.0
    sketch_LI = (values[:rows] - loss).sqrt()[:, None] * vectors[:, :rows].T
    return SketchedMoments(sketch_LI, loss, moments.mean.double(), moments.count)
