"""Layouts whose weights are float8 values of the weight's own shape, beside a grid of scales.

Owns fp8 (DeepSeek-V3, Qwen3-FP8, AutoFP8) and the float8 formats of compressed-tensors, as transformers 5.24
(integrations/finegrained_fp8.py, compressed_tensors.py) and compressed-tensors 0.20 read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray_merge.storage.quantised_parts import PART_SUFFIXES, Quantised, Read, Unclaimed, byte_slice

FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOAT_SCALES = ("F32", "F16", "BF16")
POWER_SCALES = ("U8", "F8_E8M0")
"""Scales stored as exponents: byte e stands for 2 ** (e - 127) (transformers' `scale_fmt: ue8m0`)."""

DEFAULT_FP8_BLOCK = (128, 128)
"""transformers' FineGrainedFP8Config when config.json has no `weight_block_size`; null means one scale a weight."""

COMPRESSED_FORMATS = ("float-quantized", "naive-quantized")

ACTIVATION_SCALES = ("input_scale", "activation_scale")
"""Scales of a layer's inputs; they go with its weight and have no meaning beside a dequantised one."""


def find_fp8(
    rest: Unclaimed, _config: Mapping[str, Any], quantisation: Mapping[str, Any], _read: Read
) -> dict[str, Quantised]:
    """`quant_method: fp8`."""
    block = quantisation.get("weight_block_size", DEFAULT_FP8_BLOCK)
    blocks = [] if block is None else [_block(block, "weight_block_size", rest)]
    # `weight_scale` is AutoFP8's and vLLM's name of one scale a weight; values are multiplied by either.
    return {
        name: _scaled("fp8", rest, name, ("_scale_inv", "_scale"), blocks, (*FLOAT_SCALES, *POWER_SCALES))
        for name in _float8(rest)
    }


def find_compressed(
    rest: Unclaimed, _config: Mapping[str, Any], quantisation: Mapping[str, Any], _read: Read
) -> dict[str, Quantised]:
    """`quant_method: compressed-tensors`, where every group stores 8-bit floats."""
    blocks = _compressed_blocks(rest, quantisation)
    return {
        name: _scaled("compressed-tensors-fp8", rest, name, ("_scale",), blocks, FLOAT_SCALES)
        for name in _float8(rest)
    }


def _compressed_blocks(rest: Unclaimed, quantisation: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Block shapes of the groups of a compressed-tensors config, each of which must store 8-bit floats."""
    sparsity = _mapping(quantisation.get("sparsity_config")).get("format", "dense")
    if sparsity != "dense":
        raise rest.error(f"compressed-tensors with sparsity format {sparsity!r} is not read")
    if _mapping(quantisation.get("transform_config")).get("config_groups"):
        raise rest.error("compressed-tensors with a transform_config stores its weights rotated")
    groups = _mapping(quantisation.get("config_groups"))
    if not groups:
        raise rest.error("compressed-tensors has no config_groups")
    blocks = []
    for name, group in groups.items():
        weights = _mapping(_mapping(group).get("weights"))
        form = _mapping(group).get("format") or quantisation.get("format")
        stored = f"{form}, {weights.get('num_bits')}-bit {weights.get('type')}"
        if form not in COMPRESSED_FORMATS or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            raise rest.error(
                f"compressed-tensors group {name!r} stores its weights as {stored}; read are 8-bit floats in "
                f"{' or '.join(COMPRESSED_FORMATS)}"
            )
        if weights.get("block_structure"):
            blocks.append(_block(weights["block_structure"], f"block_structure of group {name!r}", rest))
    return blocks


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _block(value: Any, name: str, rest: Unclaimed) -> tuple[int, int]:
    sizes = value.split("x") if isinstance(value, str) else value  # compressed-tensors once wrote "128x128"
    whole = isinstance(sizes, Sequence) and all(re.fullmatch("[1-9][0-9]{0,8}", str(size)) for size in sizes)
    if not whole or len(sizes) != 2:
        raise rest.error(f"{name} is {value!r}, not two whole numbers above 0")
    return int(sizes[0]), int(sizes[1])


def _float8(rest: Unclaimed) -> list[str]:
    return [
        name
        for name, entry in rest.entries.items()
        if entry.dtype in FLOAT8 and not name.endswith(PART_SUFFIXES)
    ]


def _scaled(
    scheme: str,
    rest: Unclaimed,
    name: str,
    suffixes: Sequence[str],
    blocks: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
) -> Quantised:
    """The weight `name` with its grid of scales, which must be one of the shapes that `blocks` allow."""
    scale = rest.take_one([name + suffix for suffix in suffixes], name)
    weight = rest.take(name, name)
    if scale.dtype not in dtypes:
        raise rest.error(f"{scale.name} is {scale.dtype}, not one of {', '.join(dtypes)}")
    if len(weight.shape) < 2 or 0 in weight.shape:
        raise rest.error(f"{name} ({weight.dtype}, {weight.shape}) is not a matrix or a stack of matrices")
    rows, columns = weight.shape[-2:]
    single = scale.shape in ((), (1,)) and len(weight.shape) == 2
    grid = (1, 1) if single else scale.shape[-2:]
    # Rounded up: DeepSeek-V3's kv_a_proj_with_mqa has 576 rows and 5 blocks of 128, and its own kernel masks the
    # rest. transformers 5.24 takes rows / 5 as the block when it dequantises, and refuses that weight.
    fitting = [
        block
        for block in ((rows, columns), *blocks, (1, columns))
        if grid == (-(-rows // block[0]), -(-columns // block[1]))
    ]
    if not fitting or not (single or scale.shape[:-2] == weight.shape[:-2]):
        known = " or ".join(f"{block[0]}x{block[1]}" for block in blocks)
        raise rest.error(
            f"{scale.name} is {scale.shape}; {name} {weight.shape} takes one scale, one a row"
            + (f", or one a block of {known}" if blocks else "")
        )
    module = name.removesuffix(".weight")
    joint = "_" if module == name else "."
    extras = rest.take_some({role: f"{module}{joint}{role}" for role in ACTIVATION_SCALES})
    settings = {"block": list(fitting[0]), "grid": list(grid), "factor": 1.0}
    return Quantised(scheme, weight.shape, {"weight": weight, "scale": scale, **extras}, settings)


def scaled_ranges(quantised: Quantised, start: int, stop: int) -> dict[str, tuple[int, int]]:
    """Bytes of rows `start` to `stop`, and of the rows of the grid that scale them."""
    rows = quantised.shape[-2]
    block_rows, grid_rows = quantised.settings["block"][0], quantised.settings["grid"][0]
    first, last = (row // rows * grid_rows + row % rows // block_rows for row in (start, stop - 1))
    n_scales = quantised.n_rows // rows * grid_rows
    return {
        "weight": byte_slice(quantised.parts["weight"], quantised.n_rows, start, stop),
        "scale": byte_slice(quantised.parts["scale"], n_scales, first, last + 1),
    }
