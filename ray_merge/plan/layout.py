"""What every output file holds: tensors, their order, dtypes, sizes and where their values begin; final before a run.

Pure arithmetic on headers. The cut into shards depends on the base alone; a merge may change the shape of a tensor
(a resized embedding) but neither its place nor its order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ray_merge.models.blocks import cut_shards
from ray_merge.spec import DTYPE_BYTES, FLOAT_DTYPES, TensorEntry
from ray_merge.storage.headers import make_header

SHARD_METADATA = {"format": "pt"}
"""transformers refuses a safetensors file without it."""

ADAPTER_OBJECT = "adapter/adapter_model.safetensors"
"""Where a merge's exported adapter lies: the folder `adapter` loads with PeftModel.from_pretrained."""


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of an output file.

    Args:
        name: its disk name in the base.
        source: where its values begin: the base's tensor, or one that an adapter saved.
        dtype: it is stored in.
        owner: the adapter whose file `source` lies in; "" for the base.
        renamed: its name in the output where that is another (plan/headed.py); merges that differ in it alone share
            what is read.
    """

    name: str
    source: TensorEntry
    dtype: str
    owner: str = ""
    renamed: str = field(default="", compare=False)

    @property
    def stored_name(self) -> str:
        """Its name in the output."""
        return self.renamed or self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.source.shape

    @property
    def n_bytes(self) -> int:
        """Bytes in the output."""
        return math.prod(self.source.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """One planned output file, as merges that replace nothing of the base have it."""

    index: int
    name: str
    tensors: tuple[OutTensor, ...]
    n_bytes: int


def plan_shards(
    tensors: Mapping[str, TensorEntry], out_dtype: str | None, max_shard_size: int
) -> tuple[Shard, ...]:
    """The files of every checkpoint of a recipe."""
    out = FLOAT_DTYPES[out_dtype] if out_dtype else None
    shards = []
    cuts = cut_shards(list(tensors.values()), max_shard_size)
    for index, entries in enumerate(cuts):
        # Larger elements first keeps every tensor aligned to its dtype, which readers by memory map need.
        chosen = [
            OutTensor(entry.name, entry, out if out and entry.dtype in FLOAT_DTYPES.values() else entry.dtype)
            for entry in entries
        ]
        ordered = tuple(sorted(chosen, key=lambda tensor: -DTYPE_BYTES[tensor.dtype]))
        name = f"model-{index + 1:05d}-of-{len(cuts):05d}.safetensors"
        shards.append(Shard(index, name, ordered, file_bytes(ordered)))
    return tuple(shards)


def with_replaced(
    tensors: Sequence[OutTensor], replaced: Mapping[str, tuple[str, TensorEntry]]
) -> tuple[OutTensor, ...]:
    """The tensors of a shard, some of them begun from an adapter's saved value: name -> (adapter, entry)."""
    return tuple(
        replace(tensor, source=replaced[tensor.name][1], owner=replaced[tensor.name][0])
        if tensor.name in replaced
        else tensor
        for tensor in tensors
    )


def file_bytes(tensors: Sequence[OutTensor]) -> int:
    """Length of a file that holds `tensors`."""
    header, _ = make_header(shard_layout(tensors), SHARD_METADATA)
    return len(header) + sum(tensor.n_bytes for tensor in tensors)


def shard_layout(tensors: Sequence[OutTensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of each tensor, as the writer takes them."""
    return [(tensor.stored_name, tensor.dtype, tensor.shape) for tensor in tensors]
