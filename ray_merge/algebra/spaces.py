"""Where entries of several deltas are compared, and the way back: dense, Core Space, KnOTS basis.

Owns: coordinates by chunk of rows, and lifting merged coordinates to a `Delta`. In every space the
coordinates of an adapter are a product of two thin factors, so one rule (trim, drop, elect, average) serves
all three and never holds the coordinates of all adapters at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ray_merge.algebra.bases import CoreBasis, KnotsBasis
from ray_merge.algebra.delta import BlockDelta, Delta, LowRankDelta
from ray_merge.algebra.grid import SHARED_CHUNK_ENTRIES, chunk_rows, chunk_spans
from ray_merge.algebra.sparsify import magnitude_threshold

ROUNDING = 1e-13
"""Coordinates below this share of the largest adapter's norm are rounding errors of the float64 basis and set to
zero. Where an adapter has no part in a direction its coordinate is otherwise +-1e-16, and TIES would count it
among the entries that agree: the mean would depend on the last bit of the BLAS."""

Rule = Callable[[int], Tensor]
"""Chunk index -> merged coordinates of that chunk, in the dtype of the coordinates."""


class Space(ABC):
    """Coordinates of T adapters at one site.

    Args:
        pairs: per adapter the two factors of its coordinates, (P, q_i) and (q_i, Q).
        shape: (P, Q) of the coordinates.
        floor: magnitudes up to it are zero.
    """

    def __init__(
        self, pairs: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, int], floor: float = 0.0
    ) -> None:
        self.pairs = tuple(pairs)
        self.shape = shape
        self.floor = floor
        self._thresholds: dict[tuple[int, int], float] = {}

    @property
    def n_entries(self) -> int:
        """P * Q."""
        return self.shape[0] * self.shape[1]

    @property
    def n_chunks(self) -> int:
        """Chunks of the row grid."""
        return len(chunk_spans(self.shape))

    def chunk(self, adapter: int, index: int) -> Tensor:
        """Rows of chunk `index` of one adapter's coordinates."""
        left_PR, right_RQ = self.pairs[adapter]
        step = chunk_rows(self.shape[1])
        values = left_PR[index * step : (index + 1) * step] @ right_RQ
        return torch.nn.functional.hardshrink(values, self.floor) if self.floor else values

    def chunks(self, adapter: int) -> Iterator[Tensor]:
        """All chunks of one adapter's coordinates, in order."""
        return (self.chunk(adapter, index) for index in range(self.n_chunks))

    def threshold(self, adapter: int, n_kept: int) -> float:
        """The least magnitude that is kept when `n_kept` entries of an adapter are; selected once for all merges."""
        key = (adapter, n_kept)
        if key not in self._thresholds:
            entries = partial(self.chunks, adapter)
            self._thresholds[key] = magnitude_threshold(entries, self.n_entries, n_kept)
        return self._thresholds[key]

    @abstractmethod
    def lift(self, rule: Rule) -> Delta:
        """The update whose coordinates `rule` gives."""

    def collect(self, rule: Rule) -> Tensor:
        """All merged coordinates, (P, Q)."""
        left_PR, _ = self.pairs[0]
        if not self.n_entries:
            return left_PR.new_zeros(self.shape)
        return torch.cat([rule(index) for index in range(self.n_chunks)])


class DenseSpace(Space):
    """The entries of the deltas themselves, in the work dtype; the merged update stays a rule."""

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        shape: tuple[int, int],
        dtype: torch.dtype,
        delta_chunk: Callable[[int, int], Tensor],
    ) -> None:
        super().__init__(pairs, shape)
        self._dtype = dtype
        self._delta_chunk = delta_chunk
        self._index = -1
        self._shared: dict[int, Tensor] = {}
        self._n_shared = SHARED_CHUNK_ENTRIES // max(1, chunk_rows(shape[1]) * shape[1])

    def chunk(self, adapter: int, index: int) -> Tensor:
        """Rows of chunk `index` of one adapter's delta, DoRA's magnitude included; not to be written to.

        Merges of a group ask for the same chunk one after another: those of the first adapters are kept.
        """
        if index != self._index:
            self._index = index
            self._shared.clear()
        if adapter not in self._shared:
            values = self._delta_chunk(adapter, index)
            if adapter >= self._n_shared:
                return values
            self._shared[adapter] = values
        return self._shared[adapter]

    def lift(self, rule: Rule) -> Delta:
        """A delta that runs the rule for the rows it is asked for."""
        return BlockDelta(self.shape, self._dtype, self.pairs[0][0].device, rule)


class KnotsSpace(Space):
    """S V_i, (R, I), float64."""

    def __init__(self, basis: KnotsBasis, dtype: torch.dtype) -> None:
        shape = (len(basis.S_R), basis.coordinates[0][1].shape[1])
        super().__init__(basis.coordinates, shape, _rounding_floor(basis.coordinates))
        self._basis = basis
        self._dtype = dtype

    def lift(self, rule: Rule) -> LowRankDelta:
        """U times the merged coordinates."""
        return LowRankDelta(self._basis.left_vectors.to(self._dtype), self.collect(rule).to(self._dtype))


class CoreSpace(Space):
    """M_i, (P, Q), float64."""

    def __init__(self, basis: CoreBasis, dtype: torch.dtype) -> None:
        shape = (basis.U_OP.shape[1], basis.Vt_QI.shape[0])
        super().__init__(basis.coordinates, shape, _rounding_floor(basis.coordinates))
        self._basis = basis
        self._dtype = dtype

    def lift(self, rule: Rule) -> LowRankDelta:
        """U M V^T, M multiplied into the side that leaves the smaller rank."""
        M_PQ = self.collect(rule)
        U_OP, Vt_QI = self._basis.U_OP, self._basis.Vt_QI
        if M_PQ.shape[0] <= M_PQ.shape[1]:
            return LowRankDelta(U_OP.to(self._dtype), (M_PQ @ Vt_QI).to(self._dtype))
        return LowRankDelta((U_OP @ M_PQ).to(self._dtype), Vt_QI.to(self._dtype))


def _rounding_floor(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    return ROUNDING * max(float(left.norm()) * float(right.norm()) for left, right in pairs)
