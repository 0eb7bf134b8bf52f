"""Ids made from content: canonical JSON -> sha256. Same inputs, same id, on any machine and in any year.

Ids of recipes, merges and units come from here and from nowhere else. Nothing here reads files or clocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

ALGORITHM_VERSION = 4
"""Raised whenever the same inputs would give other output bytes; it is part of every merge id."""

MOMENTS_VERSION = 1
"""Raised whenever the same inputs would give other moments; it is part of their ids."""

LEARN_VERSION = 2
"""Raised whenever the same inputs would give another phi; it is part of the ids of merges that learn."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; floats by their shortest repr; NaN and Inf are a ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings and sequences, as (dotted path, value); an empty one is a leaf itself."""
    if isinstance(value, Mapping | list | tuple) and not value and prefix:
        yield prefix, value
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from flatten(value[key], f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from flatten(item, f"{prefix}[{index}]")
    else:
        yield prefix, value


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The first input that differs between two identities, in words; empty when none does."""
    old, new = dict(flatten(before)), dict(flatten(after))
    for key in [*new, *(key for key in old if key not in new)]:
        # As the ids see them: 1, 1.0 and true differ, and so do null and absent.
        there, here = (canonical_json(some[key]) if key in some else "absent" for some in (old, new))
        if there != here:
            return f"{key}: {there} there, {here} here"
    return ""
