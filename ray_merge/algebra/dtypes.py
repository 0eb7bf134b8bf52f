"""The dtype and memory layout that arithmetic is done in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64


def work_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def to_work(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, detached, contiguous, and aligned.

    A BLAS may take another path for unaligned or transposed memory, and with it other last bits: a tensor
    mapped from a file at an odd offset has to give the bytes of one that was downloaded into memory.
    """
    ready = tensor.detach().to(dtype).contiguous()
    return ready.clone() if ready.data_ptr() % ALIGNMENT_BYTES else ready
