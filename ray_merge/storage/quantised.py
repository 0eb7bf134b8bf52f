"""Which stored tensors make up a quantised weight, and which of their bytes some of its rows need.

Owns the choice of a layout by `quant_method` (quantised_scaled.py, quantised_packed.py), and the refusal of all
others. Never decodes a value: that is algebra/dequantise.py, which gets the bytes that `part_ranges` names.

The stored tensors decide, not the config's lists of modules: a weight is quantised when its parts are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray_merge.spec import TensorEntry
from ray_merge.storage.quantised_packed import find_bitsandbytes, find_mxfp4, four_bit_ranges, mxfp4_ranges
from ray_merge.storage.quantised_parts import QUANT_STATE, WEIGHT_FORMAT, Quantised, Read, Unclaimed
from ray_merge.storage.quantised_scaled import find_compressed, find_fp8, scaled_ranges

SCHEMES: Mapping[str, str] = {
    "fp8": (
        "quant_method fp8 (DeepSeek-V3, Qwen3-FP8, AutoFP8): float8 values times one scale per block of "
        "`weight_block_size`, per row or per weight"
    ),
    "compressed-tensors-fp8": (
        "quant_method compressed-tensors, float-quantized or naive-quantized with 8-bit floats: float8 values times "
        "one scale per weight, row or block"
    ),
    "mxfp4": (
        "quant_method mxfp4 (gpt-oss): 4-bit floats times one power of two per 32 values; experts come out as "
        "(expert, in, out), as transformers holds them"
    ),
    "bitsandbytes-4bit": (
        "quant_method bitsandbytes, nf4 or fp4: one of 16 levels times the largest magnitude of its block, which may "
        "be quantised too (double quantisation)"
    ),
    "bitsandbytes-int8": "quant_method bitsandbytes, LLM.int8(): 8-bit integers times SCB / 127 of their row",
}
"""What can be dequantised, and how."""

REFUSED: Mapping[str, str] = {
    "aqlm": "it stores indices into learned codebooks",
    "auto-round": "it stores GPTQ's or AWQ's packed integers",
    "awq": "it interleaves 4-bit integers in an order that depends on its version",
    "bitnet": "it packs three-valued weights that need rounded inputs",
    "eetq": "it interleaves 8-bit integers for one kind of GPU",
    "fbgemm_fp8": "its layout is not read",
    "fouroversix": "its layout is not read",
    "fp_quant": "it stores weights rotated by Hadamard matrices",
    "gemma": "its layout is not read",
    "gguf": "it is another file format",
    "gptq": "it packs integers with zero points and a column order that depend on its version",
    "higgs": "it stores weights rotated by Hadamard matrices",
    "hqq": "it stores integers with zero points, laid out as its metadata says",
    "metal": "its layout is made for one kind of GPU",
    "modelopt": "its layouts are not read",
    "mxfp8": "its layout is not read",
    "nvfp4": "its layout is not read",
    "quanto": "it stores tensor subclasses of its own library",
    "quark": "its layouts are not read",
    "sinq": "it stores integers with two scales and zero points",
    "spqr": "it stores outliers apart, in a sparse layout of its own",
    "torchao": "it stores tensor subclasses of its own library",
    "vptq": "it stores indices into learned codebooks",
}
"""The other values of `quant_method` that transformers 5.24 knows (and vLLM's modelopt), with the reason."""

_FINDERS: Mapping[
    str, Callable[[Unclaimed, Mapping[str, Any], Mapping[str, Any], Read], dict[str, Quantised]]
] = {
    "fp8": find_fp8,
    "compressed-tensors": find_compressed,
    "mxfp4": find_mxfp4,
    "bitsandbytes": find_bitsandbytes,
}  # by quant_method

_RANGES: Mapping[str, Callable[[Quantised, int, int], dict[str, tuple[int, int]]]] = {
    "fp8": scaled_ranges,
    "compressed-tensors-fp8": scaled_ranges,
    "mxfp4": mxfp4_ranges,
    "bitsandbytes-4bit": four_bit_ranges,
    "bitsandbytes-int8": scaled_ranges,
}  # by scheme


def quantisation_config(config: Mapping[str, Any]) -> Any:
    """What a config.json says about quantisation, at its top or in its text_config; None where it says nothing.

    Transformers looks in the same two places (quantizers/auto.py).
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    return config.get("quantization_config") or nested or None


def is_metadata(name: str) -> bool:
    """Whether `find_quantised` may read the bytes of a tensor of this name, so that a caller can fetch them at once."""
    return QUANT_STATE in name or name.endswith(WEIGHT_FORMAT)


def find_quantised(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], where: str, read: Read
) -> tuple[dict[str, Quantised], dict[str, TensorEntry]]:
    """Sort the stored tensors of a checkpoint into quantised weights and plain tensors.

    Args:
        config: the parsed config.json.
        tensors: disk name -> where its bytes lie.
        where: how messages call the checkpoint.
        read: the bytes of one small tensor; asked for names that `is_metadata` accepts.

    Returns:
        Quantised weights by the name that the weight has in an unquantised checkpoint, and every tensor that is
        part of none.

    Raises:
        CheckpointError: an unknown scheme, a part that is missing or does not fit, or a tensor that looks
            quantised and belongs to nothing.
    """
    rest = Unclaimed(dict(tensors), where)
    quantisation = quantisation_config(config)
    found: dict[str, Quantised] = {}
    if quantisation is not None:
        method = _method(quantisation, rest)
        found = _FINDERS[method](rest, config, quantisation, read)
    rest.refuse_leftovers(quantised=bool(found))
    if quantisation is not None and not found:
        raise rest.error(f"config.json says quant_method {method}, but no tensor is quantised that way")
    twice = next((name for name in found if name in rest.entries), None)
    if twice is not None:
        raise rest.error(f"{twice} is there both quantised and plain")
    return found, rest.entries


def row_unit(quantised: Quantised) -> int:
    """Smallest number of rows that can be decoded on its own: one row, or all rows of one expert for mxfp4.

    mxfp4 stores experts transposed, so that every row of the result needs bytes from all over its expert.
    """
    return quantised.shape[-2] if quantised.scheme == "mxfp4" else 1


def part_ranges(quantised: Quantised, start: int, stop: int) -> dict[str, tuple[int, int]]:
    """The bytes that rows `start` to `stop` of the weight, seen as a matrix, need.

    Args:
        quantised: the weight.
        start: a multiple of `row_unit`.
        stop: a larger multiple of `row_unit`.

    Returns:
        Role -> (start, end) in the part's file, whole elements of the part's dtype. Roles that are not named here
        are not needed.
    """
    unit = row_unit(quantised)
    assert 0 <= start < stop <= quantised.n_rows, (start, stop, quantised.n_rows)
    assert start % unit == stop % unit == 0, (start, stop, unit)
    return _RANGES[quantised.scheme](quantised, start, stop)


def _method(quantisation: Any, rest: Unclaimed) -> str:
    if not isinstance(quantisation, Mapping):
        raise rest.error(f"quantization_config is {quantisation!r}, not an object")
    method = quantisation.get("quant_method")
    # Checkpoints from before quant_method existed (transformers reads them so too).
    if quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit"):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _FINDERS:
        reason = REFUSED.get(str(method), "it is not known")
        raise rest.error(
            f"quant_method {method!r} cannot be dequantised: {reason} (read are {', '.join(_FINDERS)})"
        )
    return method


__all__ = [
    "REFUSED",
    "SCHEMES",
    "Quantised",
    "find_quantised",
    "is_metadata",
    "part_ranges",
    "quantisation_config",
    "row_unit",
]
