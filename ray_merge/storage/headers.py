"""The header of a safetensors file: parsed from untrusted bytes, and written for a planned file.

Owns the format's rules (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length,
a JSON object, then the data without holes. Never reads tensor data.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ray_merge.errors import CheckpointError, shown
from ray_merge.spec import DTYPE_BYTES, TensorEntry
from ray_merge.storage.store import Store
from ray_merge.storage.strict_json import MAX_JSON_BYTES, parse_object

MAX_NAME_CHARACTERS = 1000
"""Of a tensor; real ones have some 100. Numbers in names are read as such, which Python does up to 4300 digits."""

MAX_DIMENSIONS = 64

FIRST_READ_BYTES = 65_536
"""One request fetches length and header of a usual adapter (62 tensors: 8 kB); longer headers need a second."""


@dataclass(frozen=True, slots=True)
class Header:
    """What one safetensors file holds: `tensors` by name in file order, offsets counted from byte 0."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(store: Store, path: str) -> Header:
    """Header of the safetensors file at `path`.

    Raises:
        CheckpointError: the file is missing, truncated or malformed; the message says where.
    """
    raw, n_bytes = fetch_header(store, path)
    return parse_header(raw, file=path, file_bytes=n_bytes, where=f"{store.url}/{path}")


def fetch_header(store: Store, path: str) -> tuple[bytes, int]:
    """The JSON part of the header at `path` as it is stored, and the length of the whole file in bytes.

    Raises:
        CheckpointError: the file is missing or truncated, or its header too long to be read.
    """
    where = f"{store.url}/{path}"
    info = store.info(path)
    if info is None:
        raise CheckpointError(f"{where} does not exist")
    first = store.read(path, 0, min(FIRST_READ_BYTES, info.n_bytes))
    if len(first) < 8:
        raise CheckpointError(f"{where} is {info.n_bytes} bytes long: no safetensors file")
    length = int.from_bytes(first[:8], "little")
    if 8 + length > info.n_bytes:
        raise CheckpointError(
            f"{where} claims a header of {length} bytes but is {info.n_bytes} bytes long: "
            "truncated, or no safetensors file"
        )
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{where} has a header of {length} bytes, at most {MAX_JSON_BYTES} are read; save it in several files"
        )
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw += store.read(path, len(first), 8 + length)
    return raw, info.n_bytes


def parse_header(raw: bytes, *, file: str, file_bytes: int, where: str) -> Header:
    """Check every entry of a header against the file's length and against the others.

    Args:
        raw: the JSON part alone.
        file: name to put into the entries.
        file_bytes: length of the whole file.
        where: how messages call the file.
    """
    document = parse_object(raw, f"{where}: the safetensors header")
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ is not a mapping of strings")
    data_start = 8 + len(raw)
    entries = [_entry(name, value, file, data_start, where) for name, value in document.items()]
    _check_layout(entries, data_start, file_bytes, where)
    return Header({entry.name: entry for entry in entries}, metadata)


def _entry(name: str, value: Any, file: str, data_start: int, where: str) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{where}: tensor {shown(name)} lacks dtype, shape or data_offsets") from error
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    if not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
        what = f"is not printable text of up to {MAX_NAME_CHARACTERS} characters"
        raise CheckpointError(f"{where}: tensor name {shown(name)} {what}")
    # Limits that no file can pass, so that a hostile shape costs no time.
    if len(numbers) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise CheckpointError(
            f"{where}: tensor {shown(name)} has a shape or offset that is no whole number >= 0"
        )
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where}: tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - start:
        raise CheckpointError(
            f"{where}: tensor {shown(name)} of shape {shown(tuple(shape))} and dtype {dtype} cannot be "
            f"{end - start} bytes"
        )
    # The adapters of a recipe have the same names and few shapes; each of its own would take half of their memory.
    return TensorEntry(
        sys.intern(name), sys.intern(dtype), _shape(*shape), file, data_start + start, data_start + end
    )


@lru_cache(maxsize=4096)
def _shape(*lengths: int) -> tuple[int, ...]:
    return lengths


def _check_layout(entries: Sequence[TensorEntry], data_start: int, file_bytes: int, where: str) -> None:
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            raise CheckpointError(
                f"{where}: tensor {shown(entry.name)} begins at byte {entry.start}, expected {position}: "
                "overlap or hole in the file"
            )
        position = entry.end
    if position != file_bytes:
        raise CheckpointError(
            f"{where} is {file_bytes} bytes long, its header promises {position}: truncated or damaged"
        )


def make_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header bytes (length included) of a file that holds `tensors` (name, dtype, shape) in that order.

    Returns:
        The bytes, padded with spaces to a multiple of 8, and the entry of each tensor (file name empty).
    """
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, dtype, shape in tensors:
        n_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        document[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + n_bytes],
        }
        position += n_bytes
    raw = json.dumps(document, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    entries = {
        name: TensorEntry(name, dtype, shape, "", start + offsets[0], start + offsets[1])
        for name, dtype, shape in tensors
        for offsets in [document[name]["data_offsets"]]
    }
    return len(raw).to_bytes(8, "little") + raw, entries
