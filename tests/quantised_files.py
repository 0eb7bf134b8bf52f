"""Small quantised weights of every scheme, made by arithmetic alone, as the bytes of one file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_merge.algebra.dequantise import STORED_DTYPES, dequantise_rows
from ray_merge.spec import TensorEntry
from ray_merge.storage.quantised import Quantised, find_quantised, part_ranges, row_unit

TORCH_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I32": torch.int32,
    **STORED_DTYPES,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in reversed(TORCH_DTYPES.items())}

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)  # fmt: skip
"""The levels that bitsandbytes 0.50.2 saves as quant_map."""

LEVELS = {"nf4": NF4, "fp4": FP4}


def pattern(*shape: int) -> Tensor:
    """Bytes that take all 256 values."""
    return ((torch.arange(math.prod(shape)) * 37 + 11) % 256).to(torch.uint8).view(shape)


def float8(*shape: int) -> Tensor:
    """Finite E4M3 values of both signs."""
    raw = pattern(*shape)
    return torch.where((raw & 127) == 127, 0, raw).view(torch.float8_e4m3fn)


def ramp(*shape: int) -> Tensor:
    """Scales that differ and that no short binary fraction holds."""
    return ((torch.arange(math.prod(shape)) % 89 + 1) / 977).view(shape)


class Stored:
    """Tensors as the bytes of one file `x`; `dtypes` renames the dtype of a tensor in its header."""

    def __init__(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, str] | None = None) -> None:
        self.entries: dict[str, TensorEntry] = {}
        self.bytes = b"header.."
        for name, tensor in tensors.items():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            dtype = (dtypes or {}).get(name, NAMES[tensor.dtype])
            start = len(self.bytes)
            self.bytes += data
            self.entries[name] = TensorEntry(name, dtype, tuple(tensor.shape), "x", start, len(self.bytes))

    def read(self, entry: TensorEntry) -> bytes:
        return self.bytes[entry.start : entry.end]

    def find(self, config: Mapping[str, Any]) -> tuple[dict[str, Quantised], dict[str, TensorEntry]]:
        return find_quantised(config, self.entries, "base", self.read)

    def parts(self, quantised: Quantised, start: int, stop: int) -> dict[str, Tensor]:
        """The parts of some rows, from the bytes of `part_ranges` alone."""
        parts = {}
        for role, (begin, end) in part_ranges(quantised, start, stop).items():
            entry = quantised.parts[role]
            assert entry.start <= begin < end <= entry.end
            data = bytearray(self.bytes[begin:end])
            parts[role] = torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype])
        return parts

    def rows(self, quantised: Quantised, start: int, stop: int) -> Tensor:
        parts = self.parts(quantised, start, stop)
        return dequantise_rows(quantised.scheme, parts, quantised.settings, quantised.shape, start, stop)

    def whole(self, quantised: Quantised) -> Tensor:
        return self.rows(quantised, 0, quantised.n_rows).view(quantised.shape)


def row_cuts(quantised: Quantised) -> list[tuple[int, int]]:
    """Every range of rows that can be decoded on its own."""
    unit, n_rows = row_unit(quantised), quantised.n_rows
    return [
        (start, stop) for start in range(0, n_rows, unit) for stop in range(start + unit, n_rows + 1, unit)
    ]


def four_bit(
    kind: str,
    shape: Sequence[int],
    block: int,
    /,
    *,
    nested: bool = False,
    storage: torch.dtype = torch.uint8,
    name: str = "m.weight",
    **state: Any,
) -> dict[str, Tensor]:
    """What bitsandbytes saves for one weight; `state` replaces entries of its quant_state."""
    n_blocks = -(-math.prod(shape) // block)
    packed = pattern(-(-math.prod(shape) // 2)).view(storage).unsqueeze(1)
    document: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": list(shape),
    }
    tensors = {name: packed, f"{name}.quant_map": torch.tensor(LEVELS[kind])}
    if nested:
        document |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.875}
        tensors |= {
            f"{name}.absmax": pattern(n_blocks),
            f"{name}.nested_absmax": 0.75 + torch.arange(-(-n_blocks // 256)) / 8,
            f"{name}.nested_quant_map": (torch.arange(256) - 128) / 129,
        }
    else:
        tensors[f"{name}.absmax"] = (torch.arange(n_blocks) % 7 + 1) / 32
    text = json.dumps(document | state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 16], "activation_scheme": "dynamic"}
FP8_SINGLE = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
FP8_PLAIN = {"quant_method": "fp8"}
MXFP4 = {"quant_method": "mxfp4"}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    """A compressed-tensors config of one group."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "strategy": strategy, **weights},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }


@dataclass(frozen=True)
class Case:
    """One quantised weight `weight` and its config."""

    quantisation: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    scheme: str
    shape: tuple[int, ...]
    weight: str = "m.weight"

    def open(self) -> tuple[Stored, Quantised]:
        stored = Stored(self.tensors)
        found, plain = stored.find({"quantization_config": self.quantisation})
        assert (list(found), plain) == ([self.weight], {})
        return stored, found[self.weight]


def _scaled_case(
    quantisation: Mapping[str, Any],
    shape: tuple[int, ...],
    scale: Tensor,
    suffix: str = "_scale_inv",
    weight: str = "m.weight",
) -> Case:
    scheme = "fp8" if quantisation["quant_method"] == "fp8" else "compressed-tensors-fp8"
    return Case(quantisation, {weight: float8(*shape), f"{weight}{suffix}": scale}, scheme, shape, weight)


def _mxfp4_case(name: str, experts: int, out: int, groups: int) -> Case:
    blocks, scales = pattern(experts, out, groups, 16), 120 + pattern(experts, out, groups) % 13
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return Case(MXFP4, tensors, "mxfp4", (experts, groups * 32, out), name)


def _int8_case() -> Case:
    weight = (pattern(24, 40).to(torch.int16) - 128).to(torch.int8)
    tensors = {
        "m.weight": weight,
        "m.SCB": (torch.arange(24) + 1) / 13,
        "m.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return Case(
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, "bitsandbytes-int8", (24, 40)
    )


def _four_bit_case(kind: str, shape: tuple[int, int], block: int, **options: Any) -> Case:
    return Case(BITSANDBYTES, four_bit(kind, shape, block, **options), "bitsandbytes-4bit", shape)


CASES: Mapping[str, Case] = {
    "fp8 blocks": _scaled_case(FP8, (64, 48), ramp(2, 3)),
    "fp8 cut blocks": _scaled_case(FP8, (70, 50), ramp(3, 4)),
    "fp8 bf16 scales": _scaled_case(FP8, (64, 48), ramp(2, 3).bfloat16()),
    "fp8 powers": _scaled_case(FP8, (64, 48), 120 + pattern(2, 3) % 13),
    "fp8 one block": _scaled_case(FP8, (20, 10), ramp(1, 1)),
    "fp8 default block": _scaled_case(FP8_PLAIN, (140, 130), ramp(2, 2)),
    "fp8 scalar": _scaled_case(FP8_SINGLE, (20, 10), torch.tensor(0.013)),
    "fp8 autofp8": _scaled_case(FP8_PLAIN, (20, 10), torch.tensor([0.013]), suffix="_scale"),
    "fp8 rows": _scaled_case(FP8_SINGLE, (20, 10), ramp(20, 1)),
    "fp8 stack": _scaled_case(FP8, (3, 40, 50), ramp(3, 2, 4), weight="experts.down_proj"),
    "fp8 stack single": _scaled_case(FP8_SINGLE, (3, 10, 12), ramp(3, 1, 1), weight="experts.up_proj"),
    "compressed tensor": _scaled_case(compressed("tensor"), (20, 10), torch.tensor([0.013]), suffix="_scale"),
    "compressed channel": _scaled_case(compressed("channel"), (20, 10), ramp(20, 1), suffix="_scale"),
    "compressed block": _scaled_case(
        compressed("block", block_structure=[8, 16]), (20, 40), ramp(3, 3), suffix="_scale"
    ),
    "mxfp4": _mxfp4_case("model.layers.0.mlp.experts.gate_up_proj", 3, 6, 2),
    "mxfp4 down": _mxfp4_case("model.layers.0.mlp.experts.down_proj", 2, 5, 1),
    "nf4": _four_bit_case("nf4", (12, 64), 64),
    "fp4": _four_bit_case("fp4", (6, 128), 64),
    "nf4 nested": _four_bit_case("nf4", (12, 64), 64, nested=True),
    "nf4 many nested": _four_bit_case("nf4", (20, 512), 32, nested=True),
    "fp4 blocks over rows": _four_bit_case("fp4", (7, 96), 64, nested=True),
    "nf4 odd": _four_bit_case("nf4", (5, 7), 32),
    "nf4 bf16 storage": _four_bit_case("nf4", (7, 96), 64, storage=torch.bfloat16),
    "nf4 f32 storage": _four_bit_case("nf4", (7, 96), 64, storage=torch.float32, nested=True),
    "int8": _int8_case(),
}
