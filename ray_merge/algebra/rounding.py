"""Base weight + update, rounded once to the stored dtype, with the loss of that rounding measured.

Four rank-16 adapters on a bfloat16 weight whose update is 1/200 of the weight lose 16 % of the update to this
one rounding, and 32 % when each adapter is baked in by itself (reference table, run with PEFT and mergekit's
routes). So: accumulate in float32, round once, and say what was lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Rounding:
    """Running sums over the row blocks of one site, in float64 and in row order."""

    update_square: float = 0.0
    lost_square: float = 0.0

    @property
    def update_norm(self) -> float:
        """Frobenius norm of the update."""
        return math.sqrt(self.update_square)

    @property
    def lost_share(self) -> float:
        """Frobenius norm of what rounding took, over the update's norm; 0 for an update of zero."""
        return math.sqrt(self.lost_square / self.update_square) if self.update_square else 0.0

    @property
    def finite(self) -> bool:
        """False as soon as base, update or result held NaN or Inf."""
        return math.isfinite(self.update_square) and math.isfinite(self.lost_square)


def add_update(base_NI: Tensor, update_NI: Tensor, dtype: torch.dtype, sums: Rounding) -> Tensor:
    """`base + update`, computed in the update's dtype, rounded once to `dtype`.

    Args:
        base_NI: rows of the base weight, any floating dtype.
        update_NI: the same rows of the update, float32 or float64.
        dtype: what is stored.
        sums: where the squares of update and loss are added.

    Returns:
        (N, I) in `dtype`.
    """
    exact_base_NI = base_NI.to(update_NI.dtype)
    stored_NI = (exact_base_NI + update_NI).to(dtype)
    # Not in place: in float32 `.to` returns the stored tensor itself.
    lost_NI = (stored_NI.to(update_NI.dtype) - exact_base_NI).sub_(update_NI)
    update, lost = _norm(update_NI), _norm(lost_NI)
    sums.update_square += update * update  # not ** 2, which raises OverflowError instead of giving inf
    sums.lost_square += lost * lost
    return stored_NI


def _norm(rows_NI: Tensor) -> float:
    """Frobenius norm: rows in their own dtype, then over rows in float64.

    Six times faster than float64 throughout and within 1e-8 of it; a row beyond 1e19 overflows, and is looked at again.
    """
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(rows_NI, dim=1), dtype=torch.float64))
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(rows_NI, dtype=torch.float64))
