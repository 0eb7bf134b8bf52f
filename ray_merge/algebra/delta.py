"""The merged update of one site, known by its factors or by a rule that makes any chunk of rows.

Owns: `Delta`. Never holds a dense (O, I) tensor: rows are computed when asked for. Rows are always computed
on the fixed grid of `grid.py` and sliced, so `rows(a, b)` equals `dense()[a:b]` bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ray_merge.algebra.grid import chunk_rows, chunk_spans, chunks_over
from ray_merge.spec import Factor

CANCELLATION = 1e-6
"""Below this share of |B|^2 |A|^2 the Gram form of the squared norm keeps fewer than 10 digits."""


class Delta(ABC):
    """The merged update of a site.

    Args:
        shape: (O, I).
        dtype: the dtype of its rows, float32 or float64.
        device: where its rows are computed.
        truncation_error: relative Frobenius error of a rank truncation that made it, 0 without one.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, truncation_error: float = 0.0
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.truncation_error = truncation_error
        self._kept: tuple[int, Tensor] | None = None

    @property
    def chunk_rows(self) -> int:
        """Rows computed at once; blocks that start at multiples of it waste no work."""
        return chunk_rows(self.shape[1])

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank of the factors (an upper bound of the matrix rank), or -1 where there are none."""

    @abstractmethod
    def factors(self) -> Factor | None:
        """B (O, R) and A (R, I) with scale 1 in the work dtype, or None where only rows are known."""

    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm, accumulated in float64."""

    @abstractmethod
    def chunk(self, index: int) -> Tensor:
        """Rows of chunk `index` of the grid, (rows, I)."""

    def kept_chunk(self, index: int) -> Tensor:
        """`chunk`, kept until another is asked for; not to be written to."""
        if self._kept is None or self._kept[0] != index:
            self._kept = (index, self.chunk(index))
        return self._kept[1]

    def scaled(self, factor: float) -> Delta:
        """`factor` times this update. Several multiples of one update share each chunk's computation."""
        return ScaledDelta(self, factor)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, (stop - start, I), in the work dtype.

        Raises:
            IndexError: if the rows are not inside the site.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of a site with {self.shape[0]} rows")
        return self._filled(start, stop, self.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole (O, I) update, rounded to `dtype` (default: the work dtype)."""
        return self._filled(0, self.shape[0], dtype or self.dtype)

    def _filled(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        step = self.chunk_rows
        if start % step == 0 and stop == min(start + step, self.shape[0]) and stop > start:
            return self.chunk(start // step).to(dtype)  # one whole chunk needs no copy
        out_BI = torch.empty((stop - start, self.shape[1]), dtype=dtype, device=self.device)
        for index in chunks_over(self.shape[1], start, stop):
            first, last = max(start, index * step), min(stop, (index + 1) * step)
            rows_CI = self.chunk(index)[first - index * step : last - index * step]
            out_BI[first - start : last - start] = rows_CI
        return out_BI


class LowRankDelta(Delta):
    """B (O, R) times A (R, I); both in the work dtype, scale folded in."""

    def __init__(self, B_OR: Tensor, A_RI: Tensor, truncation_error: float = 0.0) -> None:
        super().__init__((B_OR.shape[0], A_RI.shape[1]), B_OR.dtype, B_OR.device, truncation_error)
        self.B_OR = B_OR
        self.A_RI = A_RI

    @property
    def rank(self) -> int:
        """R."""
        return self.B_OR.shape[1]

    def factors(self) -> Factor:
        """The factors, scale 1."""
        return Factor(B=self.B_OR, A=self.A_RI, scale=1.0)

    def chunk(self, index: int) -> Tensor:
        """B's rows of the chunk times A."""
        step = self.chunk_rows
        return self.B_OR[index * step : (index + 1) * step] @ self.A_RI

    def norm(self) -> float:
        """Frobenius norm from the factors alone."""
        return self._norm

    @cached_property
    def _norm(self) -> float:
        return product_norm(self.B_OR, self.A_RI)


class BlockDelta(Delta):
    """An update known by a rule from chunk index to rows; the rule holds factors and thresholds only."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        rule: Callable[[int], Tensor],
    ) -> None:
        super().__init__(shape, dtype, device)
        self._rule = rule

    @property
    def rank(self) -> int:
        """-1: no factors are known."""
        return -1

    def factors(self) -> None:
        """None: no factors are known."""
        return

    def chunk(self, index: int) -> Tensor:
        """The rule's rows of chunk `index`."""
        return self._rule(index)

    def norm(self) -> float:
        """Frobenius norm, one pass over the chunks, kept for the next call."""
        return self._norm

    @cached_property
    def _norm(self) -> float:
        n_chunks = len(chunk_spans(self.shape))
        return math.sqrt(sum(float(self.chunk(index).double().square().sum()) for index in range(n_chunks)))


class ScaledDelta(Delta):
    """A multiple of another update, whose chunks it looks at one after another."""

    def __init__(self, delta: Delta, factor: float) -> None:
        super().__init__(delta.shape, delta.dtype, delta.device, delta.truncation_error)
        self._delta = delta
        self._factor = factor

    @property
    def rank(self) -> int:
        """That of the other."""
        return self._delta.rank

    def factors(self) -> Factor | None:
        """Its factors, A multiplied."""
        found = self._delta.factors()
        return None if found is None else Factor(B=found.B, A=found.A * self._factor, scale=1.0)

    def norm(self) -> float:
        """Frobenius norm."""
        return abs(self._factor) * self._delta.norm()

    def chunk(self, index: int) -> Tensor:
        """The other's rows of chunk `index`, multiplied."""
        rows_CI = self._delta.kept_chunk(index)
        return rows_CI if self._factor == 1.0 else rows_CI * self._factor


def product_norm(B_OR: Tensor, A_RI: Tensor) -> float:
    """Frobenius norm of B A, accumulated in float64, without the product.

    |BA|^2 = sum of (B^T B) * (A A^T); where the terms cancel, the triangular factors of B and A^T are
    multiplied instead, which loses no digits.
    """
    if 0 in B_OR.shape or 0 in A_RI.shape:
        return 0.0
    B_OR, A_RI = B_OR.double(), A_RI.double()
    G_RR, H_RR = B_OR.T @ B_OR, A_RI @ A_RI.T
    squared = float((G_RR * H_RR).sum())
    if squared > CANCELLATION * float(G_RR.norm() * H_RR.norm()):
        return math.sqrt(squared)
    R_B = torch.linalg.qr(B_OR, mode="r").R
    R_A = torch.linalg.qr(A_RI.T, mode="r").R
    return float((R_B @ R_A.T).norm())
