"""What the readers of all formats share: a row, a table, and the check of its columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from ray_merge.errors import RecipeError, shown

ROWS_AT_ONCE = 64
"""Held while reading: rows may be images of a megabyte."""

MAX_COLUMNS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its place for messages, and the values of the columns that were asked for."""

    place: str
    values: Mapping[str, Any]


class Table(Protocol):
    """One open data file: names of its columns, rows from 0, and the values of some."""

    columns: tuple[str, ...]
    n_rows: int

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        """The rows at ascending positions; lists come as they are in JSON, as numpy arrays from parquet."""


def check_columns(there: Sequence[str], needed: Sequence[str], place: str) -> None:
    """Refuse a file that lacks a column, naming those that it has."""
    missing = next((name for name in needed if name not in there), None)
    if missing is None:
        return
    near = get_close_matches(missing, there, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "name its columns in data: {path: ..., text: [...]}"
    raise RecipeError(f"{place} has no column {missing!r}; it has {list_columns(there)}; {hint}")


def list_columns(names: Sequence[str]) -> str:
    """Names of columns for a message."""
    more = ", ..." if len(names) > MAX_COLUMNS_SHOWN else ""
    return ", ".join(shown(name) for name in names[:MAX_COLUMNS_SHOWN]) + more if names else "no columns"
