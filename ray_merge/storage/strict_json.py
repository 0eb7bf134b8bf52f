"""JSON objects from untrusted bytes: config.json, indices, adapter configs and safetensors headers.

Owns what none of them may hold: other encodings than UTF-8, keys that stand twice (readers disagree on which one
counts), and, in files that are passed on, nesting and text that other readers choke on.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ray_merge.errors import CheckpointError, shown

MAX_JSON_BYTES = 20_000_000
"""Some 150,000 tensors in a header; the largest index known (Kimi-K2) has 14 MB. A byte of hostile JSON becomes up to
25 bytes of objects."""

MAX_DEPTH = 100
"""Levels of lists and mappings inside each other. Python's own limit depends on who calls and holds for writing too."""

_TOO_DEEP = f"its values are nested more than {MAX_DEPTH} levels deep"


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `raw` is.

    Args:
        raw: at most `MAX_JSON_BYTES`, which the caller checks before it reads them.
        where: how messages call it.

    Raises:
        CheckpointError: something else, a key that stands twice, or half of a surrogate pair.
    """
    try:
        with _no_collector():
            document = json.loads(raw.decode(), object_pairs_hook=lambda pairs: _no_duplicates(pairs, where))
        if re.search(rb"\\u[dD][89a-fA-F]", raw):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise CheckpointError(f"{where} is not valid JSON that can be read ({_TOO_DEEP})") from error
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return document


def check_depth(document: dict[str, Any], where: str) -> None:
    """Refuse what could be read here but not be written again, because it is nested too deeply."""
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _items(value) if item and type(item) in (dict, list)]
        if not level:
            break
    else:
        raise CheckpointError(f"{where} is not valid JSON that can be read ({_TOO_DEEP})")


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _no_duplicates(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CheckpointError(f"{where}: {shown(_first_repeated(name for name, _ in pairs))} stands twice")
    return result


def _first_repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            break
        seen.add(name)
    return name


@contextmanager
def _no_collector() -> Iterator[None]:
    # JSON has no cycles, and looking for them in all objects made so far takes longer than to parse
    # (a header of 165,000 tensors: 3.0 s, without 1.3 s).
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
