"""Bytes <-> torch tensors, by the dtype names of the safetensors format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_merge.spec import TensorEntry

TORCH_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""The floating dtypes that are ever decoded; all others are passed through as bytes."""


def from_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor over `data`, without a copy; it must not be written to."""
    if not data:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    with warnings.catch_warnings():
        # torch warns that bytes are read-only memory; nothing here writes to a base tensor.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).view(shape)


def to_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row order, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


class TensorFile:
    """Tensors of one local safetensors file by entry, read without mapping it.

    A mapped file counts as resident memory and turns a truncation during the run into a bus error.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.path = path

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, entry: TensorEntry) -> Tensor:
        """The whole tensor in its stored dtype."""
        self._file.seek(entry.start)
        data = self._file.read(entry.n_bytes)
        if len(data) != entry.n_bytes:
            raise OSError(f"{self.path}: {entry.name} ends after {len(data)} of {entry.n_bytes} bytes")
        return from_bytes(data, entry.dtype, entry.shape)
