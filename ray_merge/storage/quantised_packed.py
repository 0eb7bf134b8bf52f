"""Layouts whose weights are stored in another shape, or as integers: mxfp4 and bitsandbytes.

Owns gpt-oss' experts as transformers 5.24 reads them (integrations/mxfp4.py), and what bitsandbytes 0.50 saves
(`QuantState.as_dict(packed=True)`, `Linear8bitLt`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ray_merge.spec import CONV1D_MODELS, TensorEntry
from ray_merge.storage.quantised_parts import (
    QUANT_STATE,
    WEIGHT_FORMAT,
    Quantised,
    Read,
    Unclaimed,
    byte_slice,
)

MXFP4_WEIGHTS = ("gate_up_proj", "down_proj")
MXFP4_BLOCK_BYTES = 16

FOUR_BIT_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes' `dequantize_4bit` accepts; multiples of 32, so that a block begins at a whole element."""

MAX_METADATA_BYTES = 65_536
"""A quant_state is some 170 bytes of JSON."""


def find_mxfp4(
    rest: Unclaimed, _config: Mapping[str, Any], _quantisation: Mapping[str, Any], _read: Read
) -> dict[str, Quantised]:
    """`quant_method: mxfp4`."""
    names = [name.removesuffix("_blocks") for name in rest.entries if name.endswith("_blocks")]
    return {name: _mxfp4(rest, name) for name in names if name.rpartition(".")[2] in MXFP4_WEIGHTS}


def _mxfp4(rest: Unclaimed, name: str) -> Quantised:
    blocks, scales = rest.take(f"{name}_blocks", name), rest.take(f"{name}_scales", name)
    fits = len(blocks.shape) == 4 and 0 not in blocks.shape and blocks.shape[:-1] == scales.shape
    if not fits or blocks.shape[-1] != MXFP4_BLOCK_BYTES or (blocks.dtype, scales.dtype) != ("U8", "U8"):
        raise rest.error(
            f"{blocks.name} ({blocks.dtype}, {blocks.shape}) and {scales.name} ({scales.dtype}, {scales.shape}) are "
            f"not U8 of shapes (experts, out, groups, {MXFP4_BLOCK_BYTES}) and (experts, out, groups)"
        )
    experts, out, groups, n_bytes = blocks.shape
    return Quantised("mxfp4", (experts, groups * n_bytes * 2, out), {"blocks": blocks, "scales": scales}, {})


def mxfp4_ranges(quantised: Quantised, start: int, stop: int) -> dict[str, tuple[int, int]]:
    """Bytes of whole experts."""
    experts, rows, _ = quantised.shape
    return {
        role: byte_slice(entry, experts, start // rows, stop // rows)
        for role, entry in quantised.parts.items()
    }


def find_bitsandbytes(
    rest: Unclaimed, config: Mapping[str, Any], _quantisation: Mapping[str, Any], read: Read
) -> dict[str, Quantised]:
    """`quant_method: bitsandbytes`, 4-bit and 8-bit."""
    # bitsandbytes stores weights of Conv1D (out, in), their unquantised checkpoints (in, out).
    if str(config.get("model_type")) in CONV1D_MODELS:
        raise rest.error(
            f"bitsandbytes stores weights of a {config['model_type']} transposed (Conv1D), so they cannot take the "
            "place of unquantised ones"
        )
    found = {}
    for name in list(rest.entries):
        if QUANT_STATE in name:
            weight, _, kind = name.partition(QUANT_STATE)
            found[weight] = _four_bit(rest, weight, kind, read)
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            found[weight] = _int8(rest, weight, read)
    return found


def _four_bit(rest: Unclaimed, name: str, kind: str, read: Read) -> Quantised:
    state_entry = rest.take(f"{name}{QUANT_STATE}{kind}", name)
    parts = {"weight": rest.take(name, name)}
    parts |= {role: rest.take(f"{name}.{role}", name) for role in ("absmax", "quant_map")}
    parts |= rest.take_some({role: f"{name}.{role}" for role in ("nested_absmax", "nested_quant_map")})
    state = _json(rest, state_entry, read)
    shape, block = state.get("shape"), state.get("blocksize")
    if kind not in ("nf4", "fp4") or state.get("quant_type") != kind:
        raise rest.error(f"{state_entry.name} holds quant_type {state.get('quant_type')!r}, not nf4 or fp4")
    if not isinstance(shape, list) or not shape or any(type(n) is not int or n < 1 for n in shape):
        raise rest.error(f"{state_entry.name} holds shape {shape!r}, not a list of whole numbers above 0")
    if type(block) is not int or block not in FOUR_BIT_BLOCKS:
        raise rest.error(f"{state_entry.name} holds blocksize {block!r}, not one of {FOUR_BIT_BLOCKS}")
    count = math.prod(shape)
    n_blocks = -(-count // block)
    settings: dict[str, Any] = {"block_elements": block}
    want = {"absmax": ("F32", n_blocks), "quant_map": ("F32", 16)}
    if len(parts) > 3:
        nested_block, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(nested_block) is not int or nested_block < 1 or not isinstance(offset, float):
            raise rest.error(
                f"{state_entry.name} holds nested_blocksize {nested_block!r} and nested_offset {offset!r}, not a "
                "whole number above 0 and a fraction"
            )
        settings |= {"nested_block_elements": nested_block, "nested_offset": offset}
        want["absmax"] = ("U8", n_blocks)
        want |= {"nested_absmax": ("F32", -(-n_blocks // nested_block)), "nested_quant_map": ("F32", 256)}
    for role, (dtype, n) in want.items():
        part = parts.get(role)
        if part is None or part.dtype != dtype or math.prod(part.shape) != n:
            got = "missing" if part is None else f"{part.dtype} {part.shape}"
            raise rest.error(f"{name}.{role} is {got}, where {name} {tuple(shape)} needs {n} {dtype}")
    # Of any dtype: two values a byte are packed into elements of `bnb_4bit_quant_storage`.
    if parts["weight"].n_bytes != -(-count // 2):
        raise rest.error(
            f"{name} is {parts['weight'].n_bytes} bytes long, but its quant_state has the shape {shape}"
        )
    return Quantised("bitsandbytes-4bit", tuple(shape), {**parts, "quant_state": state_entry}, settings)


def _json(rest: Unclaimed, entry: TensorEntry, read: Read) -> dict[str, Any]:
    if entry.n_bytes > MAX_METADATA_BYTES:
        raise rest.error(f"{entry.name} is {entry.n_bytes} bytes long, too large for metadata")
    try:
        document = json.loads(read(entry))
    except (ValueError, RecursionError) as error:
        raise rest.error(f"{entry.name} is not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise rest.error(f"{entry.name} is not a JSON object")
    return document


def four_bit_ranges(quantised: Quantised, start: int, stop: int) -> dict[str, tuple[int, int]]:
    """Bytes of the blocks that rows `start` to `stop` touch; blocks run on over rows."""
    block, columns = quantised.settings["block_elements"], quantised.shape[-1]
    first, last = start * columns // block, -(-stop * columns // block)
    weight, absmax = quantised.parts["weight"], quantised.parts["absmax"]
    n_blocks = math.prod(absmax.shape)
    ranges = {
        "weight": (weight.start + first * block // 2, min(weight.end, weight.start + last * block // 2)),
        "absmax": byte_slice(absmax, n_blocks, first, last),
    }
    nested = quantised.parts.get("nested_absmax")
    if nested is not None:
        nested_block = quantised.settings["nested_block_elements"]
        n_nested = math.prod(nested.shape)
        ranges["nested_absmax"] = byte_slice(
            nested, n_nested, first // nested_block, -(-last // nested_block)
        )
    whole = [role for role in ("quant_map", "nested_quant_map") if role in quantised.parts]
    return ranges | {role: byte_slice(quantised.parts[role], 1, 0, 1) for role in whole}


def _int8(rest: Unclaimed, name: str, read: Read) -> Quantised:
    module = name.removesuffix(".weight")
    scale, weight = rest.take(f"{module}.SCB", name), rest.take(name, name)
    shape = weight.shape
    fits = len(shape) == 2 and 0 not in shape and math.prod(scale.shape) == shape[0]
    if not fits or (weight.dtype, scale.dtype) != ("I8", "F32"):
        raise rest.error(
            f"{name} ({weight.dtype}, {shape}) and {scale.name} ({scale.dtype}, {scale.shape}) are not an I8 matrix "
            "and one F32 a row"
        )
    extras = rest.take_some({"weight_format": f"{module}{WEIGHT_FORMAT}"})
    for entry in extras.values():
        # 0 is row by row; the tilings col32 (1), col_turing (2) and col_ampere (3) are of older versions.
        if entry.n_bytes > MAX_METADATA_BYTES or any(read(entry)):
            raise rest.error(f"{entry.name} is not 0: {name} is tiled for one kind of GPU")
    settings = {"block": [1, shape[1]], "grid": [shape[0], 1], "factor": 1 / 127}
    return Quantised("bitsandbytes-int8", shape, {"weight": weight, "scale": scale, **extras}, settings)
