"""What `evaluate` prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ray_merge.show import PIPE_WIDTH

if TYPE_CHECKING:
    from ray_merge.evaluate import Evaluation

NOTHING = "-"


def evaluated(result: Evaluation, *, as_json: bool) -> None:
    """Print scores."""
    if as_json:
        print(json.dumps(result.document, indent=1, allow_nan=False))
        return
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(highlight=False, soft_wrap=True, markup=False, width=width)
    console.print(score_table(result.document))
    for title, table in extra_tables(result.document):
        console.print(f"\n{title}")
        console.print(table)
    for name, one in result.document.get("command", {}).items():
        console.print(f"\n{name}: {one['command']}: exit code {one['exit_code']}, {one['seconds']:.1f} s")
        console.print(one["stdout_tail"].rstrip("\n"))
    console.print()
    for name in result.missing:
        console.print(f"missing   {name} is not complete")
    for note in result.document["notes"]:
        console.print(f"note      {note}")
    console.print(f"written   {result.url} ({result.seconds:.1f} s)")


def score_table(document: Mapping[str, Any]) -> Table:
    """Models by tasks: values, percent of the single adapter in brackets, and the mean of that."""
    metrics = {task: row["metric"] for rows in _models(document).values() for task, row in rows.items()}
    columns = [f"{task} {'f1 (macro)' if metric == 'f1' else metric}" for task, metric in metrics.items()]
    table = Table("model", *columns, "mean %", box=None, pad_edge=False)
    held_out = document.get("held_out", [])
    for model, rows in _models(document).items():
        cells = [_cell(rows.get(task)) for task in metrics]
        table.add_row(model, *cells, _number(document["means"][model], 1))
    if held_out:
        table.caption = f"held out: {', '.join(held_out)}; no part of the mean of merges without it"
        table.caption_justify = "left"
    return table


def _models(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {model: document[model] for model in document["means"]}


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return NOTHING
    share = "" if row["normalised"] is None else f" ({row['normalised']:.1f})"
    return f"{_number(row['value'], 4)}{share}"


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def extra_tables(document: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Joint hits, and one table of preferences for each group of merges."""
    tables = []
    if "hits" in document:
        keys = list(next(iter(document["hits"].values()))["mean"])
        table = Table("model", "labels", *keys, box=None, pad_edge=False)
        for model, found in document["hits"].items():
            table.add_row(model, str(found["labels"]), *(_number(found["mean"][key], 4) for key in keys))
        tables.append(("joint hits over the labels of all tasks", table))
    for parent, found in document.get("pareto", {}).items():
        tables.append((f"preferences of {parent}", _pareto(found)))
    return tables


def _pareto(found: Mapping[str, Any]) -> Table:
    columns = [f"{task} {metric}" for task, metric in found["metrics"].items()]
    table = Table("preference", *columns, "", box=None, pad_edge=False)
    for point in found["points"]:
        values = point["preference"]
        named = values.items() if isinstance(values, Mapping) else enumerate(values)
        cells = [_number(score, 4) for score in point["scores"].values()]
        words = ", ".join(f"{key}={value:g}" for key, value in named)
        table.add_row(words, *cells, "dominated" if point["dominated"] else "on the front")
    return table
