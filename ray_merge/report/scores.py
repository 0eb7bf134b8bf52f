"""evaluation.json as a table of scores, and as plots of what is won here and lost there.

The file may be of any version: what is missing or no number is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from ray_merge.recipe.names import BASE, LOWER_IS_BETTER, SINGLE
from ray_merge.report.charts import Dot, scatter
from ray_merge.report.markup import NOTHING, Markup, breakable, number, table, tag

MAX_MODELS, MAX_TASKS = 400, 40
"""Rows and columns of the table."""

PAIRED_TASKS = 3
"""Of one group of preferences, plotted pair by pair; the table beside them has every task."""


def scores(document: Mapping[str, Any], key: str) -> Markup:
    """Everything that a report says of one evaluation.json.

    Args:
        document: its content.
        key: unique on the page.
    """
    models = [str(name) for name in document["means"]][:MAX_MODELS]
    tasks = _tasks(document, models)
    parts: list[Markup | None] = [
        _compared(document, models, key),
        _table(document, models, tasks[:MAX_TASKS]),
        *_preferences(document, key),
        _hits(document),
    ]
    if len(document["means"]) > MAX_MODELS or len(tasks) > MAX_TASKS:
        parts.append(
            tag("p", f"The first {MAX_MODELS} models and {MAX_TASKS} tasks are shown.", class_="note")
        )
    missing = [str(name) for name in _list(document.get("missing"))]
    if missing:
        parts.append(tag("p", f"Not scored, because not complete: {', '.join(missing[:40])}", class_="note"))
    notes = [tag("li", str(note)) for note in _list(document.get("notes"))]
    return tag("div", *parts, tag("ul", *notes, class_="note") if notes else None)


def _list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else []


def _dict(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}


def _rows(document: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    return _dict(document.get(model))


def _tasks(document: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """Task names in order."""
    return list(dict.fromkeys(task for model in models for task in _rows(document, model)))


def _value(document: Mapping[str, Any], model: str, task: str, key: str) -> float | None:
    return _number(_dict(_rows(document, model).get(task)).get(key))


def _number(given: Any) -> float | None:
    usable = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
    return float(given) if usable else None


def _table(document: Mapping[str, Any], models: Sequence[str], tasks: Sequence[str]) -> Markup:
    best = {task: _best(document, models, task) for task in tasks}
    metrics = {task: _metric(document, models, task) for task in tasks}
    rows = []
    for place, model in enumerate(models, start=1):
        cells = [_cell(document, model, task, best[task]) for task in tasks]
        rows.append([breakable(model), str(place), *cells, number(_number(document["means"][model]))])
    head = ["model", "no.", *(f"{task} ({metrics[task]})" for task in tasks), "mean %"]
    caption = "Scores; in brackets percent of the single adapter's. Bold: the best merge of a task"
    return table(caption, head, rows, class_="numbers")


def _metric(document: Mapping[str, Any], models: Sequence[str], task: str) -> str:
    rows = (_dict(_rows(document, model).get(task)) for model in models)
    metric = next((str(row["metric"]) for row in rows if "metric" in row), "")
    return f"{metric}, lower is better" if metric in LOWER_IS_BETTER else metric


def is_merge(model: str) -> bool:
    """Neither the base nor a single adapter."""
    return model != BASE and not model.startswith(f"{SINGLE}/")


def _best(document: Mapping[str, Any], models: Sequence[str], task: str) -> float | None:
    found = [_value(document, model, task, "normalised") for model in models if is_merge(model)]
    return max((one for one in found if one is not None), default=None)


def _cell(document: Mapping[str, Any], model: str, task: str, best: float | None) -> str | Markup:
    value = _value(document, model, task, "value")
    share = _value(document, model, task, "normalised")
    if value is None or share is None:
        return number(value)
    words = f"{number(value)} ({number(share)})"
    return tag("b", words) if share == best and is_merge(model) else words


def _compared(document: Mapping[str, Any], models: Sequence[str], key: str) -> Markup | None:
    """Mean against worst task, for two merges or more."""
    found = []
    for place, model in enumerate(models, start=1):
        rows = _rows(document, model)
        shares = [one for task in rows if (one := _value(document, model, task, "normalised")) is not None]
        mean = _number(document["means"][model])
        if shares and mean is not None and not model.startswith(f"{SINGLE}/"):
            found.append((place, model, mean, min(shares)))
    if sum(is_merge(model) for _, model, _, _ in found) < 2:
        return None
    pairs = [(mean, worst) for _, _, mean, worst in found]
    dots = [
        Dot(
            x=mean, y=worst, label=str(place), best=not any(_beats(other, (mean, worst)) for other in pairs),
            title=f"{place}: {model}, mean {number(mean)} %, worst task {number(worst)} %",
        )
        for place, model, mean, worst in found
    ]  # fmt: skip
    return scatter(
        "Mean of all tasks against the worst task",
        dots,
        key=f"{key}-mean",
        x_label="mean, % of single adapters",
        y_label="worst task, %",
        note="Numbers are those of the table. Diamonds: no other model is as good in both and better in one.",
    )


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _preferences(document: Mapping[str, Any], key: str) -> Iterator[Markup]:
    """Merges of one `preferences:` entry: each pair of the first tasks, and a table of all."""
    for group, (parent, found) in enumerate(_dict(document.get("pareto")).items()):
        points = [one for one in _list(_dict(found).get("points"))[:MAX_MODELS] if isinstance(one, dict)]
        metrics = dict(list(_dict(_dict(found).get("metrics")).items())[:MAX_TASKS])
        if not points:
            continue
        yield tag("h3", "Preferences of ", tag("code", parent))
        pairs = list(combinations(list(metrics)[:PAIRED_TASKS], 2))
        plots = [
            _pair_plot(points, pair, metrics, f"{key}-p{group}-{index}") for index, pair in enumerate(pairs)
        ]
        yield tag("div", *plots, class_="charts")
        yield _preference_table(points, metrics)


def _pair_plot(
    points: Sequence[Mapping[str, Any]], pair: tuple[str, str], metrics: Mapping[str, Any], key: str
) -> Markup:
    dots = []
    for place, one in enumerate(points, start=1):
        x, y = (_number(_dict(one.get("scores")).get(task)) for task in pair)
        if x is None or y is None:
            continue
        words = f"{place}: {_preference(one)}; {pair[0]} {number(x)}, {pair[1]} {number(y)}"
        dots.append(Dot(x=x, y=y, label=str(place), title=words, best=not one.get("dominated")))
    across, up = (
        f"{task} ({metrics[task]}{', lower is better' if metrics[task] in LOWER_IS_BETTER else ''})" for task in pair
    )  # fmt: skip
    note = "Diamonds: no other preference is as good on every task and better on one."
    return scatter(f"{pair[0]} against {pair[1]}", dots, key=key, x_label=across, y_label=up, note=note)


def _preference(point: Mapping[str, Any]) -> str:
    given = point.get("preference")
    named = given.items() if isinstance(given, dict) else enumerate(_list(given))
    known = ((task, _number(value)) for task, value in named)
    return ", ".join(f"{task}={NOTHING if value is None else format(value, 'g')}" for task, value in known)


def _preference_table(points: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Markup:
    rows = []
    for place, one in enumerate(points, start=1):
        given = _dict(one.get("scores"))
        values = [number(_number(given.get(task))) for task in metrics]
        rows.append(
            [_preference(one), str(place), *values, "beaten" if one.get("dominated") else "on the front"]
        )
    head = ["preference", "no.", *(f"{task} ({metric})" for task, metric in metrics.items()), "Pareto"]
    return table("Scores by preference", head, rows, class_="numbers")


def _hits(document: Mapping[str, Any]) -> Markup | None:
    found = {name: _dict(_dict(one).get("mean")) for name, one in _dict(document.get("hits")).items()}
    models = {name: mean for name, mean in found.items() if mean}
    if not models:
        return None
    keys = list(dict.fromkeys(key for mean in models.values() for key in mean))
    rows = [
        [breakable(name), *(number(_number(mean.get(key))) for key in keys)]
        for name, mean in list(models.items())[:MAX_MODELS]
    ]
    return table("Joint hits over the labels of all tasks", ["model", *keys], rows, class_="numbers")
