"""The nouns of ray-merge as frozen dataclasses. No torch, no files, no Ray: anything may import this.

Shape legend, used in names everywhere (`B_OR` is a tensor of shape (O, R)):

    O  rows of a base weight (out features)      I  columns (in features)
    R  rank: of one adapter, or the sum over all of a merge       T  adapters of a merge (tasks)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Export = Literal["checkpoint", "adapter", "both"]

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element, by the dtype names of the safetensors format."""

FLOAT_DTYPES: Mapping[str, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""A recipe's dtype names -> safetensors dtype names."""


@dataclass(frozen=True, slots=True)
class Factor:
    """One adapter's low-rank update of one site: the delta is `scale * B @ A`.

    Args:
        B: (O, R), any floating dtype.
        A: (R, I), same R. R may be 0: the adapter does not touch this site.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA; it is not folded into B or A.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor's bytes lie: `file` relative to its checkpoint, `start`..`end` counted from byte 0."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Site:
    """One base weight that adapters touch, shape (O, I).

    Args:
        name: runtime name of the module (`bert.encoder.layer.0.attention.self.query`).
        tensor: disk name of its weight (`encoder.layer.0.attention.self.query.weight`).
        shape: (O, I).
    """

    name: str
    tensor: str
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class FactorEntry:
    """Where the factor of one adapter at one site lies."""

    B: TensorEntry
    A: TensorEntry
    scale: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One PEFT adapter, known from its headers alone.

    Args:
        name: the recipe's name of it.
        url: the folder that holds adapter_config.json and adapter_model.safetensors.
        config: the parsed adapter_config.json.
        factors: runtime site name -> where its factor lies.
        heads: saved extra tensors that have no counterpart in the base (classification heads), under
            their runtime names.
        file: name of the weights file inside `url`.
        file_bytes: its size.
        file_version: the store's version of it when the headers were read; another one stops the run.
    """

    name: str
    url: str
    config: Mapping[str, Any]
    factors: Mapping[str, FactorEntry]
    heads: tuple[TensorEntry, ...]
    file: str
    file_bytes: int
    file_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """One named result: a method applied to some adapters. All defaults are filled in.

    Args:
        name: entry name, then the combination and the point of the sweep: `pairs/mnli__stsb/lambda=0.2`.
        method: canonical name of the merge method.
        adapters: in recipe order.
        parameters: by the recipe's keys, canonical (methods/resolve.py).
        export: what is written.
        seed: of every random mask.
        sweep: the point of the sweep as the recipe has it, key and value; empty without a sweep.
        combined: whether the entry asked for combinations.
    """

    name: str
    method: str
    adapters: tuple[str, ...]
    parameters: Mapping[str, Any]
    export: Export = "checkpoint"
    seed: int = 0
    sweep: tuple[tuple[str, Any], ...] = ()
    combined: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """What a merge did to one site; deterministic, so it may enter sites.parquet.

    Args:
        site: runtime name.
        tensor: disk name.
        rank: rank of the update as factors, or -1 where it is only known densely.
        update_norm: Frobenius norm of the update, before rounding.
        lost_share: Frobenius norm of (stored - base - update) over update_norm: what rounding to the
            output dtype took; 0 for an update of zero.
        truncation_error: relative Frobenius error of a rank truncation, 0 without one.
    """

    site: str
    tensor: str
    rank: int
    update_norm: float
    lost_share: float
    truncation_error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof of one committed object of one merge.

    Args:
        merge_id: 64 hex digits.
        name: object name inside the merge's folder.
        n_bytes: its length in bytes.
        sha256: its content, 64 hex digits.
        tensors: how many tensors it holds.
        unit: id of the unit that made it.
        sites: what was merged in it.
        seconds: by phase: read, merge, write, upload.
        worker: host and process that made it.
        adopted: True when the object was there already with the same bytes.
    """

    merge_id: str
    name: str
    n_bytes: int
    sha256: str
    tensors: int
    unit: str
    sites: tuple[SiteReport, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    worker: str = ""
    adopted: bool = False
