"""Adapters whose headers differ in numbers alone: a family is parsed once, its other members are compared with it.

Owns the proof that a header says the same as one that was parsed before, but for rank and offsets; all else is left
to the parser. A thousand adapters of a base with 126 layers have 1.8 million tensors: parsed one by one they took
70 s and 3 GB, compared as text 3 s.

A family is plain LoRA: A (r, I) and B (O, r) of one rank, which the config says, and nothing else in the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, overload

from ray_merge.errors import CheckpointError
from ray_merge.spec import DTYPE_BYTES, TensorEntry
from ray_merge.storage.adapter_config import Settings
from ray_merge.storage.adapter_names import read_name
from ray_merge.storage.modules import StoredModule
from ray_merge.storage.strict_json import parse_object

_ENTRY = re.compile(
    rb'"([A-Za-z0-9_.]{1,1000})": ?\{"dtype": ?"([A-Z0-9]+)", ?"shape": ?\[([0-9]+), ?([0-9]+)\], ?'
    rb'"data_offsets": ?\[([0-9]+), ?([0-9]+)\]\}'
)
"""One tensor. Names have no brackets, so that what stands in brackets is never part of a name."""

GROUPS = 6

FLOATS = ("F32", "F16", "BF16", "F64")
"""What factors are stored as."""

_NUMBERS = re.compile(rb"\[([0-9, ]{3,80})\]")
_LEADING_ZERO = re.compile(rb",0[0-9]")
_METADATA = re.compile(rb'\{[ \t\r\n]*"__metadata__"[ \t\r\n]*:[ \t\r\n]*(\{[^{}]*\})[ \t\r\n]*,')
"""With the white space that JSON has; a regex's own takes vertical tabs and form feeds too."""


@dataclass(frozen=True, slots=True)
class Family:
    """What the headers of a family have in common; tensors in the order of the header.

    Args:
        names, dtypes: of the tensors.
        rank_axes: 0 for lora_A, 1 for lora_B: the axis whose length is the rank.
        others: length of the other axis.
        begins, ends: of their bytes at rank 1, counted from the first tensor's.
        file: name of the weights file in every adapter's folder.
        modules: runtime name, and the places of A and B, by name.
        index: tensor name -> its place.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    rank_axes: bytes
    others: array[int]
    begins: array[int]
    ends: array[int]
    file: str
    modules: tuple[tuple[str, int, int], ...]
    index: Mapping[str, int]

    def numbers(self, rank: int) -> list[int]:
        """Rows, columns, begin and end of each tensor at a rank, as a header lists them."""
        found = [rank] * (4 * len(self.names))
        found[0::4] = [rank if axis == 0 else n for axis, n in zip(self.rank_axes, self.others, strict=True)]
        found[1::4] = [n if axis == 0 else rank for axis, n in zip(self.rank_axes, self.others, strict=True)]
        found[2::4] = [rank * begin for begin in self.begins]
        found[3::4] = [rank * end for end in self.ends]
        return found


@dataclass(frozen=True, slots=True)
class Member:
    """One header of a family.

    Args:
        family: which.
        rank: of every factor.
        data_start: where the first tensor's bytes begin in the file.
    """

    family: Family
    rank: int
    data_start: int

    def entry(self, index: int) -> TensorEntry:
        """The tensor at place `index`."""
        family, rank = self.family, self.rank
        other, dtype = family.others[index], family.dtypes[index]
        shape = (rank, other) if family.rank_axes[index] == 0 else (other, rank)
        start, end = (self.data_start + rank * edge for edge in (family.begins[index], family.ends[index]))
        return TensorEntry(family.names[index], dtype, shape, family.file, start, end)


class MemberModules(Sequence[StoredModule]):
    """The adapted modules of a member, made when they are looked at."""

    def __init__(self, member: Member) -> None:
        self.member = member

    def __len__(self) -> int:
        return len(self.member.family.modules)

    @overload
    def __getitem__(self, index: int) -> StoredModule: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[StoredModule]: ...
    def __getitem__(self, index: int | slice) -> StoredModule | Sequence[StoredModule]:
        if isinstance(index, slice):
            return [self._module(*found) for found in self.member.family.modules[index]]
        return self._module(*self.member.family.modules[index])

    def __iter__(self) -> Iterator[StoredModule]:
        return (self._module(*found) for found in self.member.family.modules)

    def _module(self, name: str, A: int, B: int) -> StoredModule:
        return StoredModule(name, 0, {"A": self.member.entry(A), "B": self.member.entry(B)})


class Families:
    """The families of the adapters that one process reads; may be asked from several threads."""

    def __init__(self) -> None:
        self._families: dict[tuple[Any, ...], Family] = {}
        self._members: dict[tuple[int, int, int], Member] = {}
        self._lock = threading.Lock()

    def member(
        self, raw: bytes, file: str, file_bytes: int, settings: Settings, config: Mapping[str, Any]
    ) -> Member | None:
        """The header as a member of a family, or None where only the parser can tell what it says.

        Args:
            raw: the JSON part of the header.
            file: name of the file.
            file_bytes: its length.
            settings: of the adapter.
            config: they were read from.
        """
        kind, rank, data_start = _kind(settings, config), settings.scaling.r, 8 + len(raw)
        text = None if kind is None else _without_metadata(raw)
        read = None if text is None else _split(text)
        if read is None or text is None:
            return None
        skeleton, numbers = read
        key = (kind, file, skeleton)
        family = self._families.get(key)
        if family is None:
            made = _family(text, numbers, rank, file)
            if made is None:
                return None
            with self._lock:
                # Another thread may have been first, with other lengths: the key has none.
                family = self._families.setdefault(key, made)
        member = _proven(family, numbers, rank, data_start, file_bytes)
        if member is None:
            return None
        with self._lock:
            return self._members.setdefault((id(family), rank, data_start), member)


def _proven(family: Family, numbers: list[int], rank: int, data_start: int, file_bytes: int) -> Member | None:
    """The header with these numbers as a member of `family`, if it is one; nothing else makes a `Member`.

    Args:
        family: whichever the header is said to be of; its names, order and dtypes are the header's own.
        numbers: of the header, as `Family.numbers` lists them.
        rank: of every factor.
        data_start: where the first tensor's bytes begin.
        file_bytes: length of the file.
    """
    if numbers != family.numbers(rank) or data_start + rank * max(family.ends) != file_bytes:
        return None
    return Member(family, rank, data_start)


def _kind(settings: Settings, config: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What else an adapter's place in a base depends on; None for settings by which ranks differ between modules."""
    scaling = settings.scaling
    if scaling.ranks or scaling.alphas or settings.tokens or settings.parameters or settings.mutated:
        return None
    if settings.dora or settings.lora_bias or settings.blocks or settings.training_only:
        return None
    auto = json.dumps(config.get("auto_mapping"), sort_keys=True)
    return (
        scaling.rslora, settings.bias, settings.transposed, settings.saved, settings.tied, settings.version,
        settings.expert_layout, config.get("task_type"), auto,
    )  # fmt: skip


def _without_metadata(raw: bytes) -> bytes | None:
    """The header without its `__metadata__`, None where that is not where and what it usually is."""
    found = _METADATA.match(raw)
    if found is None:
        return raw if b"__metadata__" not in raw else None
    try:
        metadata = parse_object(found[1], "")
    except CheckpointError:
        return None
    text = b"{" + raw[found.end() :].lstrip(b" ")
    texts = all(isinstance(value, str) for value in metadata.values())
    return text if texts and b"__metadata__" not in text else None


def _split(text: bytes) -> tuple[bytes, list[int]] | None:
    """A header as (digest of its text without numbers, its numbers in pairs); None where it is no usual one."""
    pieces = _NUMBERS.split(text.rstrip(b" "))
    skeleton, pairs = b"#".join(pieces[::2]), pieces[1::2]
    if b"[" in skeleton or not pairs:
        return None
    numbers = b",".join(pairs)
    # JSON has no 016, which int() takes; and [1, 2] [3, 4] must not be [1] [2, 3, 4].
    has_zeros = _LEADING_ZERO.search(b"," + numbers.replace(b" ", b""))
    if has_zeros or b";".join(pairs).translate(None, b"0123456789 ") != b";".join([b","] * len(pairs)):
        return None
    try:
        values = list(map(int, numbers.split(b",")))
    except ValueError:
        return None
    return hashlib.sha256(skeleton).digest(), values


def _family(text: bytes, numbers: list[int], rank: int, file: str) -> Family | None:
    """What a header says, if it holds nothing but factors of two axes and that rank, one after the other.

    Args:
        text: of the header, without metadata.
        numbers: all of them.
        rank: that the config says.
        file: name of the file.
    """
    pieces = _ENTRY.split(text.rstrip(b" "))
    between = set(pieces[GROUPS + 1 : -1 : GROUPS + 1])
    if pieces[0] != b"{" or pieces[-1] != b"}" or not between <= {b",", b", "}:
        return None
    names = tuple(sys.intern(name.decode()) for name in pieces[1 :: GROUPS + 1])
    dtypes = tuple(sys.intern(dtype.decode()) for dtype in pieces[2 :: GROUPS + 1])
    rows, columns, begins, ends = (
        list(map(int, pieces[group :: GROUPS + 1])) for group in range(3, GROUPS + 1)
    )
    axes, modules = _factors(names)
    others = [c if axis == 0 else r for axis, r, c in zip(axes, rows, columns, strict=False)]
    spans = sorted(zip(begins, ends, strict=True))
    follows = all(before[1] == after[0] for before, after in pairwise(spans))
    if not axes or not set(dtypes) <= set(FLOATS) or not follows or spans[0][0] != 0 or 0 in others:
        return None
    # One side of every factor is the rank and all ranks are one, so offsets are multiples of it.
    firsts = [begin // rank for begin in begins]
    sizes = [other * DTYPE_BYTES[dtype] for other, dtype in zip(others, dtypes, strict=True)]
    try:
        family = Family(
            names=names,
            dtypes=dtypes,
            rank_axes=axes,
            others=array("q", others),
            begins=array("q", firsts),
            ends=array("q", [begin + size for begin, size in zip(firsts, sizes, strict=True)]),
            file=file,
            modules=modules,
            index=dict(zip(names, range(len(names)), strict=True)),
        )
    except OverflowError:  # numbers that no file can have
        return None
    # A family of which not even its first header is a member would keep all others of its key from theirs.
    return family if family.numbers(rank) == numbers else None


def _factors(names: Sequence[str]) -> tuple[bytes, tuple[tuple[str, int, int], ...]]:
    """The axis of the rank of each tensor, and the modules; empty where a tensor or a module is no plain pair."""
    places: tuple[dict[str, int], dict[str, int]] = ({}, {})
    axes = bytearray()
    for index, key in enumerate(names):
        name = known_name(key)
        if isinstance(name, str) or name.role not in ("A", "B") or name.depth:
            return b"", ()
        axis = 0 if name.role == "A" else 1
        places[axis][name.module] = index
        axes.append(axis)
    if places[0].keys() != places[1].keys() or len(names) != 2 * len(places[0]):
        return b"", ()
    return bytes(axes), tuple((name, A, places[1][name]) for name, A in sorted(places[0].items()))


known_name = lru_cache(maxsize=65_536)(read_name)
"""What a tensor's name says; the adapters of one base share their names."""
