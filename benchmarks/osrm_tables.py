"""Markdown tables from the rows of osrm_suite.py; nothing is computed here but means, differences and spreads.

Spread is the standard deviation over seeds (n - 1), absent where there is one seed. Differences are paired: taken seed
by seed, between starts that share head, order of rows and test rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from osrm_tasks import INITS, Settings

Row = Mapping[str, Any]

VIEWS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "grid mean": statistics.fmean,
    "grid min": min,
    "best": max,
}
"""What a curve over lambda is summed up by; `best` is the best on the test rows."""

PAIRS = (("osrm", "default"), ("osrm", "random"), ("osrm_peft", "default"), ("random", "default"))
"""Differences that are printed; the second and the third compare directions at equal norms."""

Curves = Mapping[tuple[str, str], Mapping[int, Sequence[float]]]
"""(method, init) -> seed -> values over the grid of lambda, in percent."""


def tables(rows: Sequence[Row], settings: Settings) -> Iterator[str]:
    """All tables that the rows have figures for."""
    full = len(settings.tasks)
    main = of_tasks(rows, settings, full)
    trainings = [row for row in main if row["kind"] == "training"]
    merges = [row for row in main if row["kind"] == "merge"]
    yield from _singles(trainings, settings)
    for key, what in (("normalised", "percent of the single adapters"), ("mean", "test score, percent")):
        yield from _merges(merges, key, f"{full} tasks merged, {what}")
    yield from _pairs(trainings, merges, settings)
    yield from _meetings(trainings)
    yield from _series([row for row in rows if row["kind"] == "merge"], settings)


def of_tasks(rows: Sequence[Row], settings: Settings, n_tasks: int) -> list[Row]:
    """Rows of so many tasks with the default number of samples."""
    return [row for row in rows if row["tasks"] == n_tasks and row["samples"] in (0, settings.samples)]


def cell(values: Sequence[float], digits: int = 1, *, signed: bool = False) -> str:
    """Mean and spread."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    return f"{text} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines]) + "\n"


def _singles(rows: Sequence[Row], settings: Settings) -> Iterator[str]:
    lines = []
    means = single_means(rows, settings)
    for init in dict.fromkeys(row["init"] for row in rows):
        scores = [
            [100 * row["score"] for row in rows if (row["init"], row["task"]) == (init, task)]
            for task in settings.tasks
        ]
        lines.append([init, *map(cell, scores), cell(list(means[init].values()))])
    yield "Single adapters, test score (accuracy; Pearson's r for sst_score), percent:\n"
    yield table(["init", *settings.tasks, "mean"], lines)


def single_means(rows: Sequence[Row], settings: Settings) -> dict[str, dict[int, float]]:
    """Init -> seed -> mean over tasks in percent, for seeds that have all tasks."""
    found: dict[str, dict[int, float]] = {init: {} for init in INITS}
    for init, seed in dict.fromkeys((row["init"], row["seed"]) for row in rows):
        scores = [100 * row["score"] for row in rows if (row["init"], row["seed"]) == (init, seed)]
        if len(scores) == len(settings.tasks):
            found[init][seed] = statistics.fmean(scores)
    return found


def curves(rows: Sequence[Row], key: str) -> Curves:
    """Of one column; a merge's rows are written together, so every curve is whole."""
    percent = 100.0 if key == "mean" else 1.0
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["lambda"]):
        by_seed = found.setdefault((row["method"], row["init"]), {})
        by_seed.setdefault(row["seed"], []).append(percent * row[key])
    return found


def _merges(rows: Sequence[Row], key: str, title: str) -> Iterator[str]:
    found = curves(rows, key)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    grids = {name: sorted({row["lambda"] for row in rows if row["method"] == name}) for name in methods}
    for method, grid in grids.items():
        if len(grid) > 1:
            lines = [
                [
                    init,
                    *(cell([curve[at] for curve in by_seed.values()]) for at in range(len(grid))),
                    *(cell([view(curve) for curve in by_seed.values()]) for view in VIEWS.values()),
                ]
                for init in INITS
                if (by_seed := found.get((method, init)))
            ]
            yield f"{method}, {title}:\n"
            yield table(["init", *(f"lambda {value:g}" for value in grid), *VIEWS], lines)
    flat = [method for method, grid in grids.items() if len(grid) == 1]
    lines = [
        [init, *(cell([curve[0] for curve in found.get((method, init), {}).values()]) for method in flat)]
        for init in INITS
        if any((method, init) in found for method in flat)
    ]
    yield f"Without a grid (base: no merge, the task's head on the base model), {title}:\n"
    yield table(["init", *flat], lines)


def _pairs(trainings: Sequence[Row], merges: Sequence[Row], settings: Settings) -> Iterator[str]:
    """Differences between starts, seed by seed."""
    columns: dict[str, Mapping[str, Mapping[int, float]]] = {"single": single_means(trainings, settings)}
    for key, word in (("normalised", "%"), ("mean", "score")):
        found = curves(merges, key)
        for method in dict.fromkeys(row["method"] for row in merges):
            by_init = {init: found.get((method, init), {}) for init in INITS}
            is_grid = any(len(curve) > 1 for by_seed in by_init.values() for curve in by_seed.values())
            for name in ("grid mean", "best") if is_grid else ("best",):
                view = VIEWS[name]
                columns[f"{method} {word}" + (f", {name}" if is_grid else "")] = {
                    init: {seed: view(curve) for seed, curve in by_seed.items()}
                    for init, by_seed in by_init.items()
                }
    lines = []
    for name, values in columns.items():
        gains = [
            [value - values[control][seed] for seed, value in values[init].items() if seed in values[control]]
            for init, control in PAIRS
        ]
        lines.append([name, *(cell(some, signed=True) for some in gains)])
    yield "Paired differences in points (%: of the percent of the single adapters; score: of the test score):\n"
    yield table(["", *(f"{init} - {control}" for init, control in PAIRS)], lines)


def _meetings(rows: Sequence[Row]) -> Iterator[str]:
    """How adapters meet the other tasks' inputs, before and after training."""
    lines = []
    for init in dict.fromkeys(row["init"] for row in rows):
        found = [row for row in rows if row["init"] == init]
        line = [
            cell([row[when][key] for row in found], 3)
            for key in ("norm", "to_chance")
            for when in ("before", "after")
        ]
        update = cell([100 * row["after"]["update"] for row in found], 2)
        lines.append([init, *line, update, cell([100 * row["kept"] for row in found])])
    head = ["rms of A h before", "after", "to random directions before", "after", "s B A h to W h, %"]
    yield (
        "Norms at held-out inputs h of the other tasks, before and after training (means over sites and tasks; spread "
        "over adapters);\nand how much of the trained A lies in the span of its first rows:\n"
    )
    yield table(["init", *head, "kept, %"], lines)


def _series(rows: Sequence[Row], settings: Settings) -> Iterator[str]:
    """By number of calibration samples and of tasks, one seed."""
    full, first = len(settings.tasks), min((row["seed"] for row in rows), default=0)
    rows = [row for row in rows if row["seed"] == first]
    whole = [row for row in rows if row["tasks"] == full]
    cases = {
        (f"{init}, {n} samples" if n else init): [
            row for row in whole if (row["init"], row["samples"]) == (init, n)
        ]
        for n in sorted({row["samples"] for row in whole})
        for init in ("default", "osrm")
    }
    if len({row["samples"] for row in whole if row["init"] == "osrm"}) > 1:
        yield from _cases("By number of calibration samples of each partner task", cases)
    counts = sorted({row["tasks"] for row in rows})
    if len(counts) > 1:
        cases = {
            f"{n} tasks, {init}": [row for row in of_tasks(rows, settings, n) if row["init"] == init]
            for n in counts
            for init in INITS
        }
        yield from _cases("By number of merged tasks", cases)


def _cases(title: str, cases: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """One line for each case, three columns for each method with a grid and one for the others."""
    by_case = {case: curves(rows, "normalised") for case, rows in cases.items() if rows}
    methods = list(dict.fromkeys(method for found in by_case.values() for method, _ in found))
    head, lines = ["case"], {case: [case] for case in by_case}
    for method in methods:
        columns = {
            case: [
                list(curve)
                for (name, _), by_seed in found.items()
                if name == method
                for curve in by_seed.values()
            ]
            for case, found in by_case.items()
        }
        is_grid = any(len(curve) > 1 for some in columns.values() for curve in some)
        for name in VIEWS if is_grid else ("best",):
            head.append(f"{method}, {name}" if is_grid else method)
            for case, some in columns.items():
                lines[case].append(cell([VIEWS[name](curve) for curve in some]))
    yield f"{title}, percent of the single adapters (one seed):\n"
    yield table(head, list(lines.values()))
