"""JSON lines and text lines, found by one pass and then read by range; and csv. Blank lines are no rows."""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from ray_merge.calibration.columns import ROWS_AT_ONCE, Row, check_columns
from ray_merge.calibration.files import DataFile
from ray_merge.errors import RecipeError, shown

BLOCK_BYTES = 2**23
MAX_LINE_BYTES = 2**26
"""An image of 3 x 512 x 512 written as JSON numbers is some 16 MB."""

MAX_CSV_BYTES = 2**29
"""A csv file is held whole, because quoted line breaks hide where its rows begin."""


class LineTable:
    """A file with one row per line: JSON objects, or plain texts (column `text`)."""

    def __init__(self, file: DataFile, limit: int | None, place: str) -> None:
        self._file, self._place = file, place
        self._starts, self._ends, self._numbers = array("q"), array("q"), array("q")
        for number, start, end in _lines(file, place):
            if limit is not None and len(self._starts) == limit:
                break
            self._starts.append(start)
            self._ends.append(end)
            self._numbers.append(number)
        self.n_rows = len(self._starts)
        self._is_text = file.format == "txt"
        self.columns = ("text",) if self._is_text else tuple(self._object(0)) if self.n_rows else ()

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        """See Table."""
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[begin : begin + ROWS_AT_ONCE]
            spans = [(self._starts[row], self._ends[row]) for row in some]
            for row, data in zip(
                some, self._file.store.read_ranges(self._file.info.path, spans), strict=True
            ):
                place = self._where(row)
                if self._is_text:
                    yield Row(place, {"text": _decoded(data, place)})
                    continue
                values = _parsed(data, place)
                check_columns(tuple(values), columns, place)
                yield Row(place, {name: values[name] for name in columns})

    def _object(self, row: int) -> dict[str, Any]:
        data = self._file.store.read(self._file.info.path, self._starts[row], self._ends[row])
        return _parsed(data, self._where(row))

    def _where(self, row: int) -> str:
        return f"{self._place}: line {self._numbers[row]}"


def _lines(file: DataFile, place: str) -> Iterator[tuple[int, int, int]]:
    """Number (from 1), start and end of every line that is not blank, without its line break."""
    number, rest = 1, b""
    for begin in range(0, file.info.n_bytes, BLOCK_BYTES):
        end = min(begin + BLOCK_BYTES, file.info.n_bytes)
        block = rest + file.store.read(file.info.path, begin, end)
        at = begin - len(rest)
        *whole, rest = block.split(b"\n")
        if end == file.info.n_bytes:
            whole, rest = [*whole, rest], b""
        for line in whole:
            kept = line.rstrip(b"\r")
            if kept.strip() not in {b"", b"\xef\xbb\xbf"}:
                yield number, at, at + len(kept)
            at += len(line) + 1
            number += 1
        if len(rest) > MAX_LINE_BYTES:
            raise RecipeError(
                f"{place}: line {number} is longer than {MAX_LINE_BYTES} bytes; write one row per line, or parquet"
            )


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{place} is not UTF-8 text ({error.reason}); convert the file") from error


def _parsed(data: bytes, place: str) -> dict[str, Any]:
    try:
        values = json.loads(_decoded(data, place))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RecipeError(f"{place} is no JSON object ({reason}); write one object per line") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{place} is {shown(values)}, no JSON object; write one object per line")
    return values


class CsvTable:
    """A csv file whose first line names the columns; all values are texts."""

    def __init__(self, file: DataFile, limit: int | None, place: str) -> None:
        if file.info.n_bytes > MAX_CSV_BYTES:
            raise RecipeError(
                f"{place} is {file.info.n_bytes} bytes long, csv is read up to {MAX_CSV_BYTES}; write parquet"
            )
        self._place = place
        text = _decoded(file.store.read(file.info.path, 0, file.info.n_bytes), place)
        try:
            lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
        except csv.Error as error:
            raise RecipeError(f"{place} is no csv file ({error}); write it again") from error
        self.columns = tuple(lines[0]) if lines else ()
        self._rows = lines[1:] if limit is None else lines[1 : limit + 1]
        self.n_rows = len(self._rows)

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        """See Table."""
        for row in rows:
            place, cells = f"{self._place}: row {row + 1}", self._rows[row]
            if len(cells) != len(self.columns):
                raise RecipeError(
                    f"{place} has {len(cells)} cells under {len(self.columns)} column names; quote texts with commas"
                )
            yield Row(place, {name: cells[self.columns.index(name)] for name in columns})
