"""Bytes <-> torch tensors, by the dtype names of the safetensors format, and stored tensors as matrices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ray_merge.spec import DTYPE_BYTES, TensorEntry, View

TORCH_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""The floating dtypes that updates are added to; all others are passed through as bytes."""

_WARNINGS = Lock()
"""Python's warning filters belong to the process: two threads that silence a warning at once may leave it silent."""

PIECE_ELEMENTS = 2**21
"""Elements looked at together: 16 MiB as float64."""


def from_bytes(data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor over `data`, without a copy; it must not be written to."""
    if not data:
        return torch.empty(shape, dtype=dtype)
    with _WARNINGS, warnings.catch_warnings():
        # torch warns that bytes are read-only memory; nothing here writes to a base tensor.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=dtype).view(shape)


def to_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row order, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def as_matrix(tensor: Tensor, view: View) -> Tensor:
    """The (rows, columns) matrix that `view` makes of a stored tensor."""
    matrix = tensor.reshape(view.shape)
    if view.pick is not None:
        matrix = matrix.select(*view.pick)
    if view.blocks > 1:
        chunks = torch.chunk(matrix, view.blocks, dim=0)
        matrix = torch.block_diag(*chunks)  # type: ignore[no-untyped-call]
    if view.transpose:
        matrix = matrix.T
    if view.cut is not None:
        axis, start, stop = view.cut
        matrix = matrix.narrow(axis, start, stop - start)
    return matrix


class TensorFile:
    """Tensors of one local safetensors file by entry, read without mapping it.

    A mapped file counts as resident memory and turns a truncation during the run into a bus error. The last two
    tensors that experts are picked from are kept: lora_B of gate_up_proj and of down_proj lie across all experts.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._last: dict[tuple[int, int], Tensor] = {}
        self.path = path

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._last.clear()

    def read_bytes(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of the file."""
        self._file.seek(start)
        data = self._file.read(end - start)
        if len(data) != end - start:
            raise OSError(f"{self.path}: ends {end - start - len(data)} bytes early")
        return data

    def read(self, entry: TensorEntry) -> Tensor:
        """The whole tensor in its stored dtype."""
        return from_bytes(self.read_bytes(entry.start, entry.end), TORCH_DTYPES[entry.dtype], entry.shape)

    def pieces(self, entry: TensorEntry) -> Iterator[Tensor]:
        """The elements of a tensor in order, flat, some million at a time: a saved embedding table is gigabytes."""
        step = PIECE_ELEMENTS * DTYPE_BYTES[entry.dtype]
        for start in range(entry.start, entry.end, step):
            end = min(start + step, entry.end)
            n_items = (end - start) // DTYPE_BYTES[entry.dtype]
            yield from_bytes(self.read_bytes(start, end), TORCH_DTYPES[entry.dtype], (n_items,))

    def matrix(self, view: View) -> Tensor:
        """The matrix that `view` makes of its tensor, in the stored dtype."""
        if view.pick is None:
            return as_matrix(self.read(view.entry), view)
        axis, index = view.pick
        if axis == 0:  # one expert of A lies in one piece
            step = view.entry.n_bytes // view.shape[0]
            data = self.read_bytes(view.entry.start + index * step, view.entry.start + (index + 1) * step)
            one = from_bytes(data, TORCH_DTYPES[view.entry.dtype], (1, *view.shape[1:]))
            return as_matrix(one, replace(view, shape=(1, *view.shape[1:]), pick=(0, 0)))
        key = (view.entry.start, view.entry.end)
        if key not in self._last:
            if len(self._last) > 1:
                del self._last[next(iter(self._last))]
            self._last[key] = self.read(view.entry)
        return as_matrix(self._last[key], view)
