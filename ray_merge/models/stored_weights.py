"""Runtime parameters of a model, read from a checkpoint by byte range, in the dtype that they are stored in.

Owns: assembling one parameter from its disk tensors (renamed, stacked experts, joined rows, quantised).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ray_merge.algebra.dequantise import STORED_DTYPES, dequantise_rows
from ray_merge.errors import CheckpointError
from ray_merge.models.conversion import Slot
from ray_merge.spec import DTYPE_BYTES, TensorEntry
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.quantised import Quantised, part_ranges, row_unit
from ray_merge.storage.store import Store, check_unchanged
from ray_merge.storage.stream import CHUNK_BYTES, Reader

PLAIN_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Dtypes of tensors that are used as they are, by their safetensors names."""


class StoredWeights:
    """Reads parameters and persistent buffers of one model.

    Args:
        checkpoint: the base.
        store: its folder.
        slots: runtime name -> disk tensors (`Skeleton.slots`).
        unsupported: runtime name -> why it has no slots (`Skeleton.unsupported`).

    Attributes:
        read_names: runtime names in the order in which they were read, repeats included.
        n_read: bytes read from the store so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        store: Store,
        slots: Mapping[str, tuple[Slot, ...]],
        unsupported: Mapping[str, str] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._store = store.pinned(checkpoint.weight_files)
        self._slots = slots
        self._unsupported = unsupported or {}
        self._planned = {info.path: info for info in checkpoint.weight_files}
        self._checked: set[str] = set()
        self.read_names: list[str] = []
        self.n_read = 0

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def key(self, name: str) -> tuple[Slot, ...]:
        """What tells one stored parameter from another: tied names have the same key."""
        return self._slots[name]

    def n_bytes(self, names: Iterable[str]) -> int:
        """Bytes of these parameters in memory, as stored (quantised ones: decoded); each disk tensor counts once."""
        tensors = dict.fromkeys(slot.tensor for name in names for slot in self._slots[name])
        return sum(self._checkpoint.tensors[tensor].n_bytes for tensor in tensors)

    def read(self, name: str) -> Tensor:
        """One parameter or buffer of the model.

        Returns:
            The stored values in the stored dtype, of the shape that the class has; quantised weights in the dtype
            that they decode to.

        Raises:
            CheckpointError: the checkpoint does not hold it, or in a form that is not read.
            RunFailed: its file has changed since the checkpoint's headers were read.
        """
        slots = self._slots.get(name)
        if not slots:
            why = self._unsupported.get(name, "no disk tensor is loaded into it")
            raise CheckpointError(
                f"{self._checkpoint.url} gives the model no {name} ({why}), which its activations depend on; use a "
                "base that holds it, or a merge method that needs no data"
            )
        self.read_names.append(name)
        with Reader(self._store) as reader:
            whole = torch.empty(self._shape(slots), dtype=self._dtype(slots))
            for slot in slots:
                self._put(reader, slot.tensor, _place(whole, slot))
            self.n_read += reader.n_bytes
        return whole

    def _shape(self, slots: tuple[Slot, ...]) -> tuple[int, ...]:
        shape = list(self._checkpoint.tensors[slots[0].tensor].shape)
        if slots[0].rows is not None:
            shape[slots[0].axis] = max(slot.rows[1] for slot in slots if slot.rows is not None)
        n_experts = [1 + max(slot.expert or 0 for slot in slots)] if slots[0].expert is not None else []
        return (*n_experts, *shape)

    def _dtype(self, slots: tuple[Slot, ...]) -> torch.dtype:
        """The widest dtype among its parts."""
        for slot in slots:
            entry = self._checkpoint.tensors[slot.tensor]
            if entry.dtype not in PLAIN_DTYPES:
                raise CheckpointError(
                    f"{self._checkpoint.url}: {entry.name} is stored as {entry.dtype}, which is not computed with "
                    f"(known: {', '.join(PLAIN_DTYPES)}); give a base in one of those"
                )
        return reduce(
            torch.promote_types,
            (PLAIN_DTYPES[self._checkpoint.tensors[slot.tensor].dtype] for slot in slots),
        )

    def _put(self, reader: Reader, name: str, target: Tensor) -> None:
        """One disk tensor into its place."""
        entry = self._checkpoint.tensors[name]
        quantised = self._checkpoint.quantised.get(name)
        dtype = PLAIN_DTYPES[entry.dtype]
        direct = quantised is None and dtype == target.dtype and target.is_contiguous()
        read = target if direct else torch.empty(entry.shape, dtype=dtype)
        if quantised is not None:
            self._decode(reader, quantised, read)
        else:
            self._fill(reader, entry, entry.start, entry.end, read)
        if not direct:
            target.copy_(read)

    def _fill(self, reader: Reader, entry: TensorEntry, start: int, end: int, target: Tensor) -> None:
        """Bytes of a file into a tensor, chunk by chunk: the tensor is never there twice."""
        self._check_unchanged(entry.file)
        if start == end:
            return
        array: Any = target.reshape(-1).view(torch.uint8).numpy()
        memory = memoryview(array)
        spans = [(at, min(at + CHUNK_BYTES, end)) for at in range(start, end, CHUNK_BYTES)]
        chunks = reader.stream([(entry.file, first, last) for first, last in spans])
        for (first, last), data in zip(spans, chunks, strict=True):
            memory[first - start : last - start] = data

    def _decode(self, reader: Reader, quantised: Quantised, whole: Tensor) -> None:
        rows = whole.view(quantised.n_rows, -1)
        unit = row_unit(quantised)
        step = unit * max(1, CHUNK_BYTES // max(1, 4 * rows.shape[1] * unit))
        for start in range(0, quantised.n_rows, step):
            stop = min(start + step, quantised.n_rows)
            parts = {
                role: self._part(reader, quantised.parts[role], *span)
                for role, span in part_ranges(quantised, start, stop).items()
            }
            rows[start:stop] = dequantise_rows(
                quantised.scheme, parts, quantised.settings, quantised.shape, start, stop
            )

    def _part(self, reader: Reader, entry: TensorEntry, start: int, end: int) -> Tensor:
        dtype = STORED_DTYPES.get(entry.dtype) or PLAIN_DTYPES[entry.dtype]
        part = torch.empty((end - start) // DTYPE_BYTES[entry.dtype], dtype=dtype)
        self._fill(reader, entry, start, end, part)
        return part

    def _check_unchanged(self, file: str) -> None:
        if file in self._checked:
            return
        planned = self._planned.get(file)
        if planned is not None:
            check_unchanged(self._store, planned)
        self._checked.add(file)


def _place(whole: Tensor, slot: Slot) -> Tensor:
    """Where in the parameter a disk tensor lies; a view."""
    place = whole if slot.expert is None else whole[slot.expert]
    return place if slot.rows is None else place[(slice(None),) * slot.axis + (slice(*slot.rows),)]
