"""Rows of a quantised weight in float32, from the bytes of its parts that those rows need.

Owns the arithmetic of each scheme. Which parts and bytes: storage/quantised.py. Formulas from transformers 5.24
(integrations/mxfp4.py, finegrained_fp8.py), bitsandbytes 0.50 (backends/default/ops.py) and OCP Microscaling 1.0.
Nothing is rounded below float32: bitsandbytes and compressed-tensors give the values in the model's own dtype.
Every entry is computed by itself, so a row has the same bits however it is asked for. NaN passes through.

Shape legend beside that of spec.py: N rows of this call, E experts, B bytes of one expert, G groups or blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # exponents: torch.float8_e8m0fnu came with torch 2.7
}
"""The safetensors dtypes that only parts of quantised weights have; other parts are ordinary floats."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 16 values of a 4-bit float with 2 bits of exponent and 1 of mantissa."""

E8M0 = (*(2.0 ** (exponent - 127) for exponent in range(255)), math.nan)
"""The 256 values of a byte that is an exponent; the last one is NaN (OCP Microscaling 1.0, 5.4.1)."""

MXFP4_GROUP = 32


def dequantise_rows(
    scheme: str,
    parts: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    shape: tuple[int, ...],
    start: int,
    stop: int,
) -> Tensor:
    """Rows `start` to `stop` of a quantised weight seen as a matrix.

    Args:
        scheme: a key of `KERNELS`.
        parts: role -> the elements of exactly the bytes that `part_ranges` names, in the part's dtype
            (`STORED_DTYPES` or a float); their shapes do not matter.
        settings: as in the `Quantised`.
        shape: of the whole weight.
        start: first row, a multiple of the weight's `row_unit`.
        stop: the row after the last one.

    Returns:
        (stop - start, shape[-1]), float32.
    """
    flat = {role: part.detach().reshape(-1) for role, part in parts.items()}
    return KERNELS[scheme](flat, settings, shape, start, stop)


def _scaled(
    parts: Mapping[str, Tensor], settings: Mapping[str, Any], shape: tuple[int, ...], start: int, stop: int
) -> Tensor:
    """Values times a grid of scales, one per block of (block_rows, block_columns), restarting at each matrix."""
    rows, columns = shape[-2:]
    (block_rows, block_columns), (grid_rows, grid_columns) = settings["block"], settings["grid"]
    stored = parts["scale"]
    scales = _table(E8M0, stored)[stored.int()] if stored.dtype == torch.uint8 else stored.float()
    row_N = torch.arange(start, stop, device=stored.device)
    scale_row_N = row_N // rows * grid_rows + row_N % rows // block_rows
    scale_NG = scales.view(-1, grid_columns)[scale_row_N - scale_row_N[0]]
    values_NI = parts["weight"].to(torch.float32, copy=True).view(stop - start, columns)
    whole = columns // block_columns
    # Through a view: scales repeated over the columns would be a second matrix of that size.
    blocks_NGI = values_NI[:, : whole * block_columns].view(-1, whole, block_columns)
    blocks_NGI.mul_(scale_NG[:, :whole].unsqueeze(2))
    values_NI[:, whole * block_columns :].mul_(scale_NG[:, whole:])
    return values_NI if settings["factor"] == 1 else values_NI.mul_(settings["factor"])


def _mxfp4(
    parts: Mapping[str, Tensor], _settings: Mapping[str, Any], shape: tuple[int, ...], start: int, stop: int
) -> Tensor:
    """Experts, each stored (out, groups of 32 inputs) and returned (in, out); the lower half byte comes first."""
    rows, columns = shape[-2:]
    experts = (stop - start) // rows
    bytes_EB = parts["blocks"].view(experts, -1)
    exponents_EG = parts["scales"].view(experts, -1)
    pairs, powers = _pairs(_table(E2M1, bytes_EB), high_first=False), _table(E8M0, bytes_EB)
    result = torch.empty(stop - start, columns, dtype=torch.float32, device=bytes_EB.device)
    for expert in range(experts):
        groups = pairs.index_select(0, bytes_EB[expert].int()).view(-1, MXFP4_GROUP)
        groups.mul_(powers[exponents_EG[expert].int()].unsqueeze(1))
        result[expert * rows : (expert + 1) * rows].copy_(groups.view(columns, rows).T)
    return result


def _four_bit(
    parts: Mapping[str, Tensor], settings: Mapping[str, Any], shape: tuple[int, ...], start: int, stop: int
) -> Tensor:
    """Levels times the magnitude of their block; blocks run on over rows, and the upper half byte comes first."""
    columns, block = shape[-1], settings["block_elements"]
    first_block = start * columns // block
    magnitudes = _magnitudes(parts, settings, first_block)
    # Packed into any dtype (`bnb_4bit_quant_storage`); the bytes are the same.
    packed = parts["weight"].view(torch.uint8)
    values = _pairs(parts["quant_map"].float(), high_first=True).index_select(0, packed.int()).view(-1)
    whole = values.numel() // block
    values[: whole * block].view(whole, block).mul_(magnitudes[:whole].unsqueeze(1))
    values[whole * block :].mul_(magnitudes[whole:])
    skipped = start * columns - first_block * block
    return values[skipped : skipped + (stop - start) * columns].view(stop - start, columns)


def _magnitudes(parts: Mapping[str, Tensor], settings: Mapping[str, Any], first_block: int) -> Tensor:
    """The blocks' magnitudes from `first_block` on; quantised ones are levels times a magnitude, plus an offset."""
    absmax = parts["absmax"]
    if "nested_absmax" not in parts:
        return absmax.float()
    index = torch.arange(first_block, first_block + absmax.numel(), device=absmax.device)
    nested_block = settings["nested_block_elements"]
    outer = parts["nested_absmax"].float()[index // nested_block - first_block // nested_block]
    return parts["nested_quant_map"].float()[absmax.int()].mul_(outer).add_(settings["nested_offset"])


def _pairs(levels: Tensor, *, high_first: bool) -> Tensor:
    """(256, 2): both values of every byte, so that unpacking is one lookup per byte."""
    byte = torch.arange(256, device=levels.device)
    low, high = levels[byte % 16], levels[byte // 16]
    return torch.stack((high, low) if high_first else (low, high), dim=1)


def _table(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


KERNELS: Mapping[
    str, Callable[[Mapping[str, Tensor], Mapping[str, Any], tuple[int, ...], int, int], Tensor]
] = {
    "fp8": _scaled,
    "compressed-tensors-fp8": _scaled,
    "mxfp4": _mxfp4,
    "bitsandbytes-4bit": _four_bit,
    "bitsandbytes-int8": _scaled,
}
"""By scheme; the keys of storage/quantised.py's SCHEMES."""
