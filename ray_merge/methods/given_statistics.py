"""Statistics given to `merge_factors`, checked and brought into the form that a kernel takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ray_merge.errors import MethodError
from ray_merge.methods.declare import Method
from ray_merge.methods.statistics import InputSide
from ray_merge.spec import Factor

FISHER_RANGE, GRAM_RANGE = (1e-150, 1e32), (1e-150, 1e150)
"""Of the largest number, where it is not 0: squares do not vanish, and products with updates do not overflow."""

ASYMMETRY = 1e-5
"""Of the largest entry: what float32 products X^T X may differ by from their transpose."""


class FisherTensor:
    """A Fisher diagonal in memory, as `FisherRows`.

    Args:
        F_OI: (O, I).
    """

    def __init__(self, F_OI: Tensor) -> None:
        self._F_OI = F_OI
        self.norm = float(F_OI.double().norm())

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`."""
        return self._F_OI[start:stop]


def given_statistics(
    method: Method, moments: Any, factors: Sequence[Factor], input_side: InputSide
) -> dict[str, Any]:
    """The kernel's inputs "moments" and "input_side".

    Raises:
        MethodError: not one for each factor, of another kind or shape, or numbers that cannot be such statistics.
    """
    if input_side not in ("columns", "rows"):
        raise MethodError(f"input_side is {input_side!r}, expected columns or rows")
    if not isinstance(moments, Sequence) or len(moments) != len(factors):
        got = f"{len(moments)} of them" if isinstance(moments, Sequence) else f"a {type(moments).__name__}"
        raise MethodError(
            f"{method.name} takes moments as a sequence, one for each of {len(factors)} factors; got {got}"
        )
    shape = (factors[0].B.shape[0], factors[0].A.shape[1])
    if method.statistics == "fisher":
        return {"moments": [_fisher(f"moments[{place}]", one, shape) for place, one in enumerate(moments)]}
    for place, one in enumerate(moments):
        _check_gram(f"moments[{place}]", one, shape[0 if input_side == "rows" else 1])
    return {"moments": moments, "input_side": input_side}


def _fisher(place: str, one: Any, shape: tuple[int, int]) -> Any:
    if not isinstance(one, Tensor) or not one.is_floating_point() or tuple(one.shape) != shape:
        got = f"{one.dtype} {tuple(one.shape)}" if isinstance(one, Tensor) else f"a {type(one).__name__}"
        raise MethodError(f"{place} is {got}, expected a floating tensor {shape}: the Fisher diagonal")
    if not bool(torch.isfinite(one).all() and (one >= 0).all()):
        raise MethodError(f"{place} holds NaN, Inf or negative numbers; Fisher diagonals are mean squares")
    _check_range(place, one, FISHER_RANGE)
    return FisherTensor(one.detach())


def _check_gram(place: str, one: Any, n_inputs: int) -> None:
    if not hasattr(one, "gram") or not hasattr(one, "count"):
        raise MethodError(f"{place} is a {type(one).__name__}, expected ray_merge.Moments")
    gram_II = one.gram
    square = isinstance(gram_II, Tensor) and gram_II.ndim == 2 and gram_II.shape[0] == gram_II.shape[1]
    if not square or not gram_II.is_floating_point():
        got = (
            f"{gram_II.dtype} {tuple(gram_II.shape)}"
            if isinstance(gram_II, Tensor)
            else type(gram_II).__name__
        )
        raise MethodError(f"{place}.gram is {got}, expected a floating tensor {(n_inputs, n_inputs)}")
    if len(gram_II) != n_inputs:
        raise MethodError(
            f"{place} is of {len(gram_II)} inputs, but the weight takes {n_inputs}; the inputs of a weight that is "
            "stored (in, out) are its rows: give `input_side`"
        )
    diagonal_I = gram_II.diagonal()
    if not one.count >= 1 or not bool(torch.isfinite(diagonal_I).all() and (diagonal_I >= 0).all()):
        raise MethodError(
            f"{place} is of {one.count} tokens and its diagonal goes from {float(diagonal_I.min()):g} to "
            f"{float(diagonal_I.max()):g}; squares of at least one token are finite and not negative"
        )
    _check_range(place, diagonal_I, GRAM_RANGE)
    slack = max(ASYMMETRY, 4 * torch.finfo(gram_II.dtype).eps) * float(diagonal_I.max())
    apart = float((gram_II - gram_II.T).abs().max())
    if not apart <= slack:  # NaN is not
        raise MethodError(
            f"{place}.gram differs from its transpose by up to {apart:g} with a diagonal of up to "
            f"{float(diagonal_I.max()):g}; a Gram matrix X^T X is symmetric and finite"
        )


def _check_range(place: str, values: Tensor, allowed: tuple[float, float]) -> None:
    largest = float(values.max()) if values.numel() else 0.0
    if largest and not allowed[0] <= largest <= allowed[1]:
        raise MethodError(
            f"{place} goes up to {largest:g}, expected 0 or {allowed[0]:g} to {allowed[1]:g}; multiply what the model "
            "is differentiated by, or its inputs, by a constant"
        )
