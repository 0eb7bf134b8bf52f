"""adapter_model.bin, a pickle, as the safetensors file that everything else reads. Never runs code from the pickle.

Owns what such a file may hold: a mapping of names to plain tensors. torch.load(weights_only=True) does the reading,
but it also fills memory on request (`bytearray(10**10)`, compressed entries, a tensor of 10^12 elements with stride
0), so the pickle's instructions and the zip's directory are looked at first. torch is imported when a function runs.
Formats: torch `serialization.py`; a zip with uncompressed entries, or before torch 1.6 five pickles and the numbers.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ray_merge.errors import AdapterError, shown
from ray_merge.spec import DTYPE_BYTES
from ray_merge.storage.headers import MAX_NAME_CHARACTERS
from ray_merge.storage.writer import ScratchFile

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE_BYTES = 8 * 10**9
"""More than an adapter with its embeddings; larger ones can be saved as safetensors by whoever has the memory."""

MAX_LEGACY_BYTES = 200 * 10**6
"""Files from before torch 1.6 cannot be mapped and are read whole. PEFT is younger and writes none."""

MAX_DIRECTORY_BYTES = 32 * 10**6
"""Of a zip: some 300,000 tensors. Python and torch read it whole."""

MAX_OBJECT_BYTES = 64 * 10**6
"""Of the pickle inside of a zip, which names the tensors and says where their numbers are."""

MAX_INSTRUCTIONS = 2_000_000
"""Of the pickle: a tensor takes some 40. Each may make an object of 200 bytes, and they are interpreted in Python."""

MAX_INTEGER = 2**60
"""No size or offset is larger; larger integers are only good for making keys collide."""

CHUNK_BYTES = 64 * 2**20
MAPPED_BYTES = 256 * 2**20
"""What was read of a mapped file counts as resident memory until it is mapped anew."""

DTYPES: Mapping[str, str] = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "bool": "BOOL",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""torch's names -> those of the safetensors format."""

_STORAGES = ("Half", "BFloat16", "Float", "Double", "Bool", "Char", "Short", "Int", "Long", "Byte")
_ALLOWED = frozenset(
    {
        "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter", "torch.storage.UntypedStorage",
        *(f"torch.{name}" for name in DTYPES),
        *(f"{module}.{name}Storage" for module in ("torch", "torch.cuda") for name in _STORAGES),
    }
)  # fmt: skip
"""What the pickle of a state dict names."""


def convert_pickle(source: Path, target: Path) -> None:
    """Write the tensors of `source` to the new file `target`, sorted by name: the same pickle gives the same bytes.

    Raises:
        AdapterError: anything but a mapping of names to plain tensors, or more of it than the file can hold.
        FileExistsError: `target` is there.
    """
    n_bytes = source.stat().st_size
    if n_bytes > MAX_PICKLE_BYTES:
        raise AdapterError(
            f"{source} is {n_bytes} bytes long, more than {MAX_PICKLE_BYTES} for a pickle; save it as safetensors"
        )
    mapped = _check(source, n_bytes)
    tensors = _load(source, mapped)
    layout = [
        (name, _dtype(source, name, value), tuple(value.shape)) for name, value in sorted(tensors.items())
    ]
    total = sum(value.nbytes for value in tensors.values())
    if total > 4 * n_bytes:  # two names for one tensor are usual
        raise AdapterError(
            f"{source}: its tensors have {total} bytes together, but the file is {n_bytes} bytes long"
        )
    tensors.clear()
    file = ScratchFile(target, layout, {"format": "pt"})
    try:
        for data in _data(source, [name for name, _, _ in layout], mapped):
            file.write(data)
        file.close()
    except BaseException:
        file.discard()
        raise


def _check(source: Path, n_bytes: int) -> bool:
    """Refuse what `torch.load` should not see; True for a zip, which can be mapped."""
    try:
        with source.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            if zipped:
                _check_zip(source, file, n_bytes)
                return True
            if n_bytes > MAX_LEGACY_BYTES:
                raise AdapterError(
                    f"{source} is in the format of torch before 1.6 and longer than {MAX_LEGACY_BYTES} bytes; save it "
                    "as safetensors"
                )
            file.seek(0)
            for number in range(5):  # magic number, version, sizes, the object, keys of its numbers
                _check_instructions(source, file, max_integer=2**80 if number == 0 else MAX_INTEGER)
    # MemoryError: a text that claims 4 GB is asked of the file at once.
    except (ValueError, OSError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile) as error:
        raise AdapterError(f"{source} is no file of torch.save, or a damaged one ({error})") from error
    return False


def _check_zip(source: Path, file: IO[bytes], n_bytes: int) -> None:
    _check_directory(source, file, n_bytes)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        objects = [name for name in names if name.partition("/")[2] == "data.pkl"]
        if len(objects) != 1 or len(set(names)) != len(names):
            raise AdapterError(f"{source} is a zip, but none of torch.save: it holds {len(objects)} data.pkl")
        packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None or sum(entry.file_size for entry in entries) > n_bytes:
            name = packed.filename if packed is not None else "its entries"
            raise AdapterError(
                f"{source}: {shown(name)} of the zip is compressed, which torch.save never does"
            )
        order = f"{objects[0].partition('/')[0]}/byteorder"
        if order in names and archive.open(order).read(10) != b"little":
            raise AdapterError(f"{source} was saved on a big-endian machine; save it as safetensors there")
        if archive.getinfo(objects[0]).file_size > MAX_OBJECT_BYTES:
            raise AdapterError(f"{source}: its data.pkl is longer than {MAX_OBJECT_BYTES} bytes")
        with archive.open(objects[0]) as instructions:
            _check_instructions(source, instructions, max_integer=MAX_INTEGER)


def _check_directory(source: Path, file: IO[bytes], n_bytes: int) -> None:
    """The directory's length stands at the end of a zip (APPNOTE.TXT 4.3.16); zip64 needs no larger one here."""
    file.seek(max(0, n_bytes - 65_557))
    end = file.read()
    plain = (
        end[-22:-18] == b"PK\x05\x06" and end[-2:] == b"\0\0"
    )  # no comment behind it, as zipfile looks first
    found = len(end) - 22 if plain else end.rfind(b"PK\x05\x06")
    length = int.from_bytes(end[found + 12 : found + 16], "little") if found >= 0 else 0
    locator = end[max(0, found - 20) : found]
    if locator[:4] == b"PK\x06\x07":
        file.seek(int.from_bytes(locator[8:16], "little") + 40)
        length = max(int.from_bytes(file.read(8), "little"), 0 if length == 2**32 - 1 else length)
    if found < 0 or length > MAX_DIRECTORY_BYTES:
        raise AdapterError(f"{source}: the zip is truncated or its directory is damaged")
    file.seek(0)


def _check_instructions(source: Path, file: IO[bytes], *, max_integer: int) -> None:
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if count > MAX_INSTRUCTIONS:
            raise AdapterError(f"{source}: its pickle has more than {MAX_INSTRUCTIONS} instructions")
        if isinstance(argument, int) and not -max_integer < argument < max_integer:
            raise AdapterError(f"{source}: its pickle holds the number {shown(argument)}")
        wanted = str(argument).replace(" ", ".") if operation.name in ("GLOBAL", "INST") else None
        if wanted is not None and wanted not in _ALLOWED:
            raise AdapterError(
                f"{source}: its pickle asks for {shown(wanted)}, which is more than tensors, and is not run; load it "
                "where you trust it and save the tensors as safetensors"
            )


def _load(source: Path, mapped: bool) -> dict[str, Tensor]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TypedStorage is deprecated, which is torch's own matter
            loaded: Any = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises whatever its readers meet in a damaged file
        # In front of the reason, and behind it, torch tells how to load it all the same.
        text = " ".join(str(error).split())
        reason = (text.partition("WeightsUnpickler error: ")[2] or text).partition(" Please ")[0][:200]
        raise AdapterError(f"{source} is no file of torch.save, or a damaged one ({reason})") from error
    if not isinstance(loaded, dict):
        raise AdapterError(
            f"{source} holds a {type(loaded).__name__}, expected a mapping of names to tensors"
        )
    if not loaded:
        raise AdapterError(f"{source} holds no tensor")
    for name, value in loaded.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
            raise AdapterError(f"{source}: {shown(name)} is no name of a tensor")
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise AdapterError(
                f"{source}: {shown(name)} is a {type(value).__name__}, not a tensor; save the state dict alone"
            )
        _check_tensor(source, name, value)
    return {name: value.detach() for name, value in loaded.items()}


def _check_tensor(source: Path, name: str, value: Tensor) -> None:
    import torch

    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        raise AdapterError(
            f"{source}: {shown(name)} is no plain tensor ({value.layout}, {value.device.type})"
        )
    there = value.untyped_storage().nbytes()
    if value.nbytes > there:
        raise AdapterError(
            f"{source}: {shown(name)} of shape {shown(tuple(value.shape))} shows {there} stored bytes as {value.nbytes}"
        )
    if not value.is_contiguous() and value.nbytes > MAPPED_BYTES:
        raise AdapterError(
            f"{source}: {shown(name)} is large and not stored row by row; save it as safetensors"
        )


def _dtype(source: Path, name: str, value: Tensor) -> str:
    dtype = DTYPES.get(str(value.dtype).removeprefix("torch."), "")
    if dtype not in DTYPE_BYTES:
        raise AdapterError(
            f"{source}: {shown(name)} is of dtype {value.dtype}, which safetensors does not have"
        )
    return dtype


def _data(source: Path, names: list[str], mapped: bool) -> Iterator[memoryview]:
    """The bytes of every tensor in turn, row by row, in chunks."""
    import torch

    tensors = _load(source, mapped)
    seen = 0
    for name in names:
        n_bytes = tensors[name].nbytes
        for start in range(0, n_bytes, CHUNK_BYTES):
            if mapped and seen > MAPPED_BYTES:
                tensors.clear()
                tensors, seen = _load(source, mapped), 0
            flat = tensors[name].contiguous().reshape(-1).view(torch.uint8)
            chunk: Any = flat[start : start + CHUNK_BYTES].numpy()
            del flat
            seen += chunk.nbytes
            yield memoryview(chunk)
            del chunk
