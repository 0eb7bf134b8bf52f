"""The factors of all adapters of a merge at one site, and the decompositions that several merges share.

Owns: upcasting, and one computation of each basis. Never knows a method. An adapter that does not touch the
site is a factor of rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ray_merge.algebra.bases import CoreBasis, KnotsBasis, core_basis, knots_basis
from ray_merge.algebra.delta import BlockDelta, Delta, LowRankDelta
from ray_merge.algebra.dora import dora_gain, dora_rows
from ray_merge.algebra.dtypes import to_work, work_dtype
from ray_merge.algebra.grid import chunk_rows
from ray_merge.algebra.spaces import CoreSpace, DenseSpace, KnotsSpace, Space
from ray_merge.spec import Factor


class SiteFactors:
    """Factors of T adapters at one site, in adapter order.

    Args:
        factors: one per adapter, B (O, R_i) and A (R_i, I) of any floating dtype. R_i may be 0.
        base: the base weight (O, I), which DoRA's deltas depend on.

    Raises:
        ValueError: no factors, shapes that do not fit together, a magnitude without a base.
    """

    def __init__(self, factors: Sequence[Factor], base: Tensor | None = None) -> None:
        if not factors:
            raise ValueError("a site needs the factors of at least one adapter")
        shapes = {(factor.B.shape[0], factor.A.shape[1]) for factor in factors}
        if len(shapes) > 1 or any(factor.B.shape[1] != factor.A.shape[0] for factor in factors):
            listed = ", ".join(f"B {tuple(f.B.shape)} A {tuple(f.A.shape)}" for f in factors)
            raise ValueError(f"factors of one site do not fit together: {listed}")
        self.shape: tuple[int, int] = shapes.pop()
        self.dtype = work_dtype([tensor for factor in factors for tensor in (factor.B, factor.A)])
        self.device = factors[0].B.device
        self.B: tuple[Tensor, ...] = tuple(to_work(factor.B, self.dtype) for factor in factors)
        self.A: tuple[Tensor, ...] = tuple(to_work(factor.A, self.dtype) for factor in factors)
        self.scales: tuple[float, ...] = tuple(float(factor.scale) for factor in factors)
        self.magnitudes: tuple[Tensor | None, ...] = tuple(factor.magnitude for factor in factors)
        self._base = base
        self._spaces: dict[str, Space] = {}
        if self.is_dense and (base is None or tuple(base.shape) != self.shape):
            got = None if base is None else tuple(base.shape)
            raise ValueError(f"DoRA at a site of {self.shape} needs its base weight, got {got}")

    def __len__(self) -> int:
        return len(self.B)

    @property
    def ranks(self) -> tuple[int, ...]:
        """R_i of each adapter."""
        return tuple(B_OR.shape[1] for B_OR in self.B)

    @cached_property
    def pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(B_i, s_i A_i) of each adapter: their products are the deltas tau_i."""
        return tuple(
            (B_OR, A_RI if scale == 1.0 else A_RI * scale)
            for B_OR, A_RI, scale in zip(self.B, self.A, self.scales, strict=True)
        )

    @property
    def is_dense(self) -> bool:
        """Whether a delta is no product of factors: one of the adapters is DoRA here."""
        return any(magnitude is not None for magnitude in self.magnitudes)

    @cached_property
    def _deltas(self) -> _Deltas:
        return _Deltas(self.pairs, self.magnitudes, self._base)

    def delta_chunk(self, adapter: int, index: int) -> Tensor:
        """Rows of chunk `index` of tau of one adapter."""
        return self._deltas.chunk(adapter, index)

    def sum(self, weights: Sequence[float]) -> Delta:
        """sum_i weights[i] * tau_i: as factors, or by rows where an adapter is DoRA."""
        if not self.is_dense:
            return LowRankDelta(*self.weighted_sum(weights))

        def rows(index: int) -> Tensor:
            total = self.delta_chunk(0, index) * weights[0]
            for adapter in range(1, len(self)):
                total += self.delta_chunk(adapter, index) * weights[adapter]
            return total

        return BlockDelta(self.shape, self.dtype, self.device, rows)

    def weighted_sum(self, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Factors B (O, R) and A (R, I), R the sum of ranks, of sum_i weights[i] * tau_i; exact."""
        B_OR = torch.cat(self.B, dim=1)
        A_RI = torch.cat([A * (w * s) for A, w, s in zip(self.A, weights, self.scales, strict=True)], dim=0)
        return B_OR, A_RI

    @cached_property
    def knots(self) -> KnotsBasis:
        """The KnOTS basis of all deltas, float64, computed once."""
        return knots_basis(self.pairs)

    @cached_property
    def core(self) -> CoreBasis:
        """The Core Space bases of all factors, float64, computed once."""
        return core_basis(self.B, self.A, self.scales)

    def space(self, name: str) -> Space:
        """The coordinates of every delta in the space called `name`: dense, core or knots; made once.

        Raises:
            ValueError: core or knots where an adapter is DoRA.
        """
        if name not in self._spaces:
            self._spaces[name] = self._space(name)
        return self._spaces[name]

    def _space(self, name: str) -> Space:
        if name != "dense" and self.is_dense:
            raise ValueError(f"{name} space needs factors, but an adapter is DoRA here; use space: dense")
        if name == "core":
            return CoreSpace(self.core, self.dtype)
        if name == "knots":
            return KnotsSpace(self.knots, self.dtype)
        return DenseSpace(self.pairs, self.shape, self.dtype, self._deltas.chunk)


class _Deltas:
    """The rows of each adapter's delta; apart from `SiteFactors`, which spaces would otherwise keep alive in a cycle.

    Args:
        pairs: per adapter the factors whose product is its delta, without a magnitude.
        magnitudes: per adapter DoRA's, or None.
        base: the base weight, (O, I), where there are magnitudes.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        magnitudes: Sequence[Tensor | None],
        base: Tensor | None,
    ) -> None:
        self._pairs = pairs
        self._base = base
        self._gains = [
            None if magnitude is None or base is None else dora_gain(base, *pair, magnitude)
            for pair, magnitude in zip(pairs, magnitudes, strict=True)
        ]

    def chunk(self, adapter: int, index: int) -> Tensor:
        """Rows of chunk `index` of one adapter's delta."""
        left_OR, right_RI = self._pairs[adapter]
        gain = self._gains[adapter]
        if gain is not None and self._base is not None:
            return dora_rows(self._base, left_OR, right_RI, gain, index)
        step = chunk_rows(right_RI.shape[1])
        return left_OR[index * step : (index + 1) * step] @ right_RI
