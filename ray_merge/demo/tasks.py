"""The demo's tasks: what they are, their splits, and their parquet files.

Owns: the table of tasks, the seeded splits by group, `<folder>/<task>/{train,val,test}.parquet` with the
columns `text`, for pairs `text_b`, and `label` (float = regression, integer = class index).
Never does: training or scoring.
Where each text comes from, under which licence and what is arguable about it: `sources.py`.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ray_merge.demo import sources
from ray_merge.demo.sources import Row

SPLITS = ("train", "val", "test")
_VAL_SHARE, _TEST_SHARE = 0.08, 0.16
_MOST_ROWS = {"val": 200, "test": 300}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task of the demo; `labels` is empty for a regression.

    Args:
        name: folder and adapter name.
        labels: class names by index.
        max_length: tokens kept of a text.
        rows_per_class: most train rows of one class (all classes together for a regression).
        epochs: passes over the train rows.
    """

    name: str
    labels: tuple[str, ...]
    max_length: int
    rows_per_class: int
    epochs: int

    @property
    def is_regression(self) -> bool:
        """True when the label is a number and the score is Pearson's r."""
        return not self.labels

    @property
    def metric(self) -> str:
        """`pearson` or `accuracy`."""
        return "pearson" if self.is_regression else "accuracy"

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return len(self.labels) or 1


TASKS: tuple[Task, ...] = (
    Task(name="docstring", labels=sources.LIBRARIES, max_length=24, rows_per_class=400, epochs=2),
    Task(name="described", labels=("another", "this"), max_length=32, rows_per_class=1200, epochs=2),
    Task(name="name_language", labels=sources.LANGUAGES, max_length=16, rows_per_class=300, epochs=3),
    Task(name="valence", labels=(), max_length=12, rows_per_class=4000, epochs=3),
)

_ROWS: Mapping[str, Callable[[], list[Row]]] = MappingProxyType(
    {
        "docstring": sources.docstring_rows,
        "described": sources.described_rows,
        "name_language": sources.name_language_rows,
        "valence": sources.valence_rows,
    }
)


def data_versions() -> dict[str, str]:
    """Versions of everything that the texts are read from; part of the cache key.

    Raises:
        Refusal: a package of the `demo` extra is missing.
    """
    versions = {name: sources.version(name) for name in sources.DATA_PACKAGES}
    return {"python": platform.python_version(), **versions}


def split_rows(task: Task) -> dict[str, list[Row]]:
    """The task's rows by split, deterministic for given package versions.

    Exact duplicates (case and spacing apart) go first, then each group goes to one split by the hash of its
    name, then every split is cut to its cap in hash order, class by class for `train`.
    """
    seen: dict[str, Row] = {}
    for row in sorted(_ROWS[task.name]()):
        seen.setdefault(" ".join(row.text.lower().split()), row)
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    by_class: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in sorted(seen.values(), key=lambda row: sources.ordered(task.name, row.text)):
        split = _split_of(task.name, row.group)
        by_class[split, 0.0 if task.is_regression else row.label].append(row)
    for (split, _), rows in sorted(by_class.items()):
        classes = task.num_labels
        most = task.rows_per_class if split == "train" else _MOST_ROWS[split] // classes
        splits[split] += rows[:most]
    for rows in splits.values():
        rows.sort(key=lambda row: sources.ordered(task.name, row.text))
    return splits


def _split_of(task: str, group: str) -> str:
    share = int(sources.ordered(f"{task} split", group)[:8], 16) / 2**32
    if share < _TEST_SHARE:
        return "test"
    return "val" if share < _TEST_SHARE + _VAL_SHARE else "train"


def write_task(task: Task, folder: Path) -> dict[str, int]:
    """Writes `<folder>/{train,val,test}.parquet`; returns the rows of each split.

    Args:
        task: one of `TASKS`.
        folder: made here; nothing is written elsewhere.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    kind = pa.float32() if task.is_regression else pa.int32()
    counts = {}
    for split, rows in split_rows(task).items():
        labels = [row.label if task.is_regression else int(row.label) for row in rows]
        columns = {"text": pa.array([row.text for row in rows]), "label": pa.array(labels, type=kind)}
        if any(row.text_b for row in rows):
            columns["text_b"] = pa.array([row.text_b for row in rows])
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
        counts[split] = len(rows)
    return counts


def read_rows(path: Path) -> tuple[list[tuple[str, ...]], list[float]]:
    """Texts (one or two columns) and labels of one parquet file, in file order."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    names = [name for name in ("text", "text_b") if name in table.column_names]
    texts = list(zip(*(table.column(name).to_pylist() for name in names), strict=True))
    return texts, [float(label) for label in table.column("label").to_pylist()]
