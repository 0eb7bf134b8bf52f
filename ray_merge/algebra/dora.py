"""DoRA: the delta of weight decomposition, `gain * (W + s B A) - W` with gain = m / |W + s B A|.

Owns: the gain and rows of the delta. The norm is of rows for a weight stored (out, in), of columns where it is
stored transposed and for embeddings. The delta is dense, of full rank, and belongs to this very W: several DoRA
adapters are each taken against the original W. Formula: arXiv 2402.09353 eq. 5; PEFT 0.21 `tuners/lora/dora.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_merge.algebra.grid import chunk_rows, chunk_spans


def dora_gain(base_OI: Tensor, left_OR: Tensor, right_RI: Tensor, magnitude: Tensor) -> Tensor:
    """What every row or column of W + B A is multiplied by.

    Args:
        base_OI: W, any floating dtype.
        left_OR: B.
        right_RI: A, scale folded in.
        magnitude: (O, 1) of rows or (1, I) of columns.

    Returns:
        In the shape of `magnitude`, float64. A row or column that is zero gives Inf or NaN, as it does in PEFT; the
        worker then refuses the result.
    """
    shape = (base_OI.shape[0], base_OI.shape[1])
    of_rows = magnitude.shape[1] == 1 and magnitude.shape[0] == shape[0]
    squares = torch.zeros(magnitude.shape, dtype=torch.float64, device=left_OR.device)
    for start, stop in chunk_spans(shape):
        adapted_NI = base_OI[start:stop].to(left_OR.dtype) + left_OR[start:stop] @ right_RI
        squared_NI = adapted_NI.double().square_()
        if of_rows:
            squares[start:stop] = squared_NI.sum(dim=1, keepdim=True)
        else:
            squares += squared_NI.sum(dim=0, keepdim=True)
    return magnitude.double() / squares.sqrt()


def dora_rows(base_OI: Tensor, left_OR: Tensor, right_RI: Tensor, gain: Tensor, index: int) -> Tensor:
    """Rows of chunk `index` of the delta: (gain - 1) W + gain B A, which keeps the digits that W would cancel.

    The gain is near 1, so it is rounded to the dtype of `left_OR` only after 1 is taken from it.
    """
    step = chunk_rows(base_OI.shape[1])
    rows = slice(index * step, (index + 1) * step)
    base_NI = base_OI[rows].to(left_OR.dtype)
    own = gain[rows] if gain.shape[1] == 1 and gain.shape[0] == base_OI.shape[0] else gain
    return (own - 1).to(base_NI.dtype) * base_NI + own.to(base_NI.dtype) * (left_OR[rows] @ right_RI)
