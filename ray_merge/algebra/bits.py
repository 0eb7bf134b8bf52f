"""Masks as bits: 8 entries a byte, the first one in the lowest bit, rows padded to whole bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def packed_columns(n_columns: int) -> int:
    """Bytes of one row."""
    return -(-n_columns // 8)


def pack_rows(mask_NI: Tensor) -> Tensor:
    """A bool mask (N, I) as uint8 (N, ceil(I / 8)) on the CPU; padding is 0."""
    return torch.from_numpy(np.packbits(mask_NI.cpu().numpy(), axis=1, bitorder="little"))


def unpack_rows(bits_NC: Tensor, n_columns: int) -> Tensor:
    """The bool mask (N, n_columns) that was packed into uint8 (N, ceil(n_columns / 8))."""
    entries = np.unpackbits(bits_NC.numpy(), axis=1, count=n_columns, bitorder="little")
    return torch.from_numpy(entries).bool()
