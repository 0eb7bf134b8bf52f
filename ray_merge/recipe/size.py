"""Sizes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from ray_merge.errors import shown

UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(value: Any) -> int:
    """Bytes of a size such as `5GB` (10^9), `5GiB` (2^30), `5B` or a plain number of bytes."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{shown(value)} is no size; write for example 1GB or 512MiB")  # noqa: TRY004 (pydantic's)
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", str(value))
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"{shown(value)} is no size; write for example 1GB or 512MiB")
    size = int(Fraction(match[1]) * UNITS[match[2].upper()])
    if size < 1:
        raise ValueError(f"{shown(value)} is no size: it must be at least one byte")
    return size
