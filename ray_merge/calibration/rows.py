"""The rows of a task's data files: how many there are, which are sampled, and the chosen columns of those.

A table never looks at a column that it was not asked for, so a broken one does not matter. Knows no tokens and no
models.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from ray_merge.calibration.columns import Row, Table, check_columns
from ray_merge.calibration.files import DataFile
from ray_merge.calibration.line_rows import CsvTable, LineTable
from ray_merge.calibration.parquet_rows import ParquetTable
from ray_merge.errors import RecipeError


class Rows:
    """The rows of several files, one after another.

    Args:
        files: at least one.
        limit: rows to look at, from the first; None for all.
        where: the recipe's place, for messages.

    Raises:
        RecipeError: a file cannot be read as what its name says, or there is no row at all.
    """

    def __init__(self, files: Sequence[DataFile], limit: int | None, where: str) -> None:
        self._where = where
        self._tables: list[tuple[DataFile, Table]] = []
        self.n_rows = 0
        for file in files:
            left = None if limit is None else limit - self.n_rows
            if left == 0:
                break
            table = _OPEN[file.format](file, left, f"{where}: {file.url}")
            self._tables.append((file, table))
            self.n_rows += table.n_rows
        if not self.n_rows:
            raise RecipeError(f"{where}: {files[0].url} holds no rows; give data with at least one input")

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the first file that has rows."""
        return next(table.columns for _, table in self._tables if table.n_rows)

    @property
    def place(self) -> str:
        """That file, for messages."""
        return next(f"{self._where}: {file.url}" for file, table in self._tables if table.n_rows)

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        """The rows at ascending positions over all files.

        Raises:
            RecipeError: a file lacks one of the columns, or one of the rows cannot be read.
        """
        start = 0
        for file, table in self._tables:
            if table.n_rows:
                check_columns(table.columns, columns, f"{self._where}: {file.url}")
            mine = [row - start for row in rows if start <= row < start + table.n_rows]
            if mine:
                yield from table.take(mine, columns)
            start += table.n_rows


def sample_rows(n_rows: int, samples: int, seed: int, task: str) -> list[int]:
    """`samples` of `n_rows` positions without replacement, ascending; all of them where there are no more.

    The same on every machine and Python: seeded by a sha256 of (seed, task), and drawn by Floyd's algorithm from
    `random.random`, the one generator whose sequence Python promises to keep.
    """
    if n_rows <= samples:
        return list(range(n_rows))
    draw = random.Random(int.from_bytes(hashlib.sha256(f"{seed}\n{task}".encode()).digest()[:8], "big"))
    chosen: set[int] = set()
    for last in range(n_rows - samples, n_rows):
        row = int(draw.random() * (last + 1))
        chosen.add(last if row in chosen else row)
    return sorted(chosen)


_OPEN: Mapping[str, Callable[[DataFile, int | None, str], Table]] = {
    "parquet": ParquetTable, "jsonl": LineTable, "txt": LineTable, "csv": CsvTable,
}  # fmt: skip
