"""Markdown tables from the rows of real_suite.py; nothing is computed here but means and spreads over seeds."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from real_suite_units import best_settings, methods_of, task_sets

Row = Mapping[str, Any]
NOTES = """
Scores are of the first rows of test.parquet; "all" is the plain mean, a regression as Pearson x 100; "normalised" is
the mean of 100 x score / that of the single adapter. emr is scored as its unified checkpoint, without its masks.
With a regression in the suite tara_a, tara_b and adamerging include its adapter, whose phi learn from other losses."""
ROLES = {"default": "defaults", "chosen": "best of 4 on validation rows", "paper": "preset: paper"}


def tables(rows: Sequence[Row], options: argparse.Namespace) -> Iterator[str]:
    """One table for each set of tasks."""
    whole = list(task_sets(options)[0])
    singles = next((row["test"] for row in rows if row["method"] == "single"), {})
    for tasks in task_sets(options):
        some = [row for row in rows if row["tasks"] == list(tasks) and "test" in row]
        left = [name for name in whole if name not in tasks]
        yield f"\n{len(tasks)} tasks{' without ' + ', '.join(left) if left else ''}, test scores in percent\n"
        yield _table(tasks, some, singles, options, {row["key"]: row for row in rows})
        for row in rows:
            if row["tasks"] == list(tasks) and "error" in row:
                yield f"{row['method']} ({row['role']}, {row['parameters']}, seed {row['seed']}): {row['error']}"
    yield NOTES


def _table(
    tasks: Sequence[str],
    rows: Sequence[Row],
    singles: Mapping[str, float],
    options: argparse.Namespace,
    done: Mapping[str, Row],
) -> str:
    regressions = set(_regressions(options, tasks))
    classes = [task for task in tasks if task not in regressions]
    head = ["method", "setting", *tasks, "classification", "all", "normalised", "seeds", "merge s"]
    lines = [head, ["---"] * len(head)]
    if singles:
        lines.append(["single adapters", "", *_cells([singles], tasks, classes, singles), "1", ""])
    for role, words in ROLES.items():
        for name in methods_of(options):
            found = [row for row in rows if row["method"] == name and row["role"] == role]
            best = best_settings(options, name, done) if role == "chosen" else {}
            for parameters in dict.fromkeys(row["parameters"] for row in found):
                same = [row for row in found if row["parameters"] == parameters]
                by = [key for key, one in best.items() if one == parameters]
                setting = words + (f" by {' and '.join(by)}{_setting(parameters)}" if by else "")
                cells = _cells([row["test"] for row in same], tasks, classes, singles)
                lines.append([name, setting, *cells, str(len(same)), _seconds(same)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seconds(rows: Sequence[Row]) -> str:
    """CPU seconds of merges that took no learned step from the store, where a trial of the same setting had left it."""
    learned = [row["learned"] for row in rows]
    fresh = [
        row["merge_seconds"]
        for row, one in zip(rows, learned, strict=True)
        if one.get("here", 0) >= one.get("steps", 0)
    ]
    return f"{statistics.fmean(fresh):.0f}" if fresh else "-"


def _setting(parameters: str) -> str:
    return " (" + ", ".join(f"{key} {value}" for key, value in json.loads(parameters).items()) + ")"


def _cells(
    found: Sequence[Mapping[str, float]],
    tasks: Sequence[str],
    classes: Sequence[str],
    singles: Mapping[str, float],
) -> list[str]:
    cells = [_cell([scores[task] for scores in found]) for task in tasks]
    cells.append(_cell([statistics.fmean(scores[task] for task in classes) for scores in found]))
    cells.append(_cell([statistics.fmean(scores[task] for task in tasks) for scores in found]))
    if not singles:
        return [*cells, "-"]
    shares = [statistics.fmean(100 * scores[task] / singles[task] for task in tasks) for scores in found]
    return [*cells, _cell(shares)]


def _cell(values: Sequence[float]) -> str:
    text = f"{statistics.fmean(values):.1f}"
    return f"{text} +- {statistics.stdev(values):.1f}" if len(values) > 1 else text


def _regressions(options: argparse.Namespace, tasks: Sequence[str]) -> Iterator[str]:
    import pyarrow.parquet as pq

    for task in tasks:
        schema = pq.read_schema(options.suite / "tasks" / task / "val.parquet")
        if str(schema.field("label").type) in ("float", "double"):
            yield task
