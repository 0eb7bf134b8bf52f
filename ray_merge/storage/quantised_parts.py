"""A quantised weight and its stored parts, and the stored tensors that no weight has claimed yet.

Owns what the layouts share (quantised_scaled.py, quantised_packed.py): claiming each tensor once, the words of a
refusal, slices of a tensor's bytes. Never reads a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import CheckpointError
from ray_merge.spec import TensorEntry

WAY_OUT = "give the unquantised base"

QUANT_STATE = ".quant_state.bitsandbytes__"
WEIGHT_FORMAT = ".weight_format"

PART_SUFFIXES = (
    "_scale_inv", ".weight_scale", ".weight_zero_point", ".weight_packed", ".weight_global_scale", ".weight_g_idx",
    ".input_scale", ".activation_scale", ".SCB", WEIGHT_FORMAT, ".absmax", ".quant_map", ".nested_absmax",
    ".nested_quant_map", ".qweight", ".qzeros", ".g_idx", ".W_q",
)  # fmt: skip
"""Names that only parts of quantised weights have; one that no weight has claimed is refused."""

CACHE_SUFFIXES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".output_scale")
"""Scales of a quantised attention cache, where the checkpoint is a quantised one; elsewhere they are plain names."""

Read = Callable[[TensorEntry], bytes]


@dataclass(frozen=True, slots=True)
class Quantised:
    """One quantised weight.

    Args:
        scheme: a key of quantised.py's `SCHEMES`.
        shape: of the weight that it stands for.
        parts: role -> stored tensor; also parts that no value needs (scales of inputs, metadata), so that every
            stored tensor belongs to something. `part_ranges` names those that are read.
        settings: what decoding needs beside the parts; plain numbers and lists.
    """

    scheme: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorEntry]
    settings: Mapping[str, Any]

    @property
    def n_rows(self) -> int:
        """Rows of the weight seen as a matrix."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class Unclaimed:
    """The stored tensors that no quantised weight has claimed yet.

    Args:
        entries: disk name -> where its bytes lie; claiming removes from it.
        where: how messages call the checkpoint.
    """

    entries: dict[str, TensorEntry]
    where: str

    def error(self, text: str) -> CheckpointError:
        """A refusal: the checkpoint, what is wrong with it, the way out."""
        return CheckpointError(f"{self.where}: {text}; {WAY_OUT}")

    def take(self, name: str, owner: str) -> TensorEntry:
        """Claim a tensor for the weight `owner`, which is incomplete without it."""
        if name not in self.entries:
            raise self.error(f"{owner} is quantised, but {name} is missing")
        return self.entries.pop(name)

    def take_one(self, names: Sequence[str], owner: str) -> TensorEntry:
        """Claim the one tensor that is there under any of these names."""
        there = [name for name in names if name in self.entries]
        if len(there) > 1:
            raise self.error(f"{owner} has both {' and '.join(there)}")
        if not there:
            raise self.error(f"{owner} is quantised, but {' or '.join(names)} is missing")
        return self.entries.pop(there[0])

    def take_some(self, names: Mapping[str, str]) -> dict[str, TensorEntry]:
        """Claim what is there of {role: name}."""
        return {role: self.entries.pop(name) for role, name in names.items() if name in self.entries}

    def refuse_leftovers(self, *, quantised: bool) -> None:
        """Refuse what looks like part of a quantised weight and belongs to none.

        Args:
            quantised: whether any quantised weight was found.
        """
        for name, entry in self.entries.items():
            packed = entry.dtype in ("I8", "U8") and name.endswith((".weight", "_blocks", "_scales"))
            named = QUANT_STATE in name or name.endswith(PART_SUFFIXES)
            cache = quantised and name.endswith(CACHE_SUFFIXES)
            if entry.dtype.startswith("F8_") or packed or named or cache:
                raise self.error(
                    f"{name} ({entry.dtype}, {entry.shape}) looks like a part of a quantised weight or attention "
                    "cache, but belongs to no weight that can be dequantised"
                )


def byte_slice(entry: TensorEntry, n_slices: int, start: int, stop: int) -> tuple[int, int]:
    """The file's bytes of slices `start` to `stop` of a tensor that is cut into `n_slices` equal ones."""
    n_bytes = entry.n_bytes // n_slices
    return entry.start + start * n_bytes, entry.start + stop * n_bytes
