"""The curves of one learned merge: objective, each task's value and weight, kappa, and xi at the last step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ray_merge.report.charts import Series, line_chart
from ray_merge.report.curves import Curves, kept_steps
from ray_merge.report.heat import square
from ray_merge.report.limits import Limits
from ray_merge.report.markup import Markup, number, table, tag

TABLE_ROWS = 8
"""Steps in the table beside the charts."""

XI_TASKS = 16


def learning(curves: Curves, limit: Limits, key: str) -> Markup:
    """All charts of one merge.

    Args:
        curves: to be drawn.
        limit: how much.
        key: unique on the page.
    """
    if not curves.n_steps:
        return tag("p", "phi is its init: no step was taken.")
    shown = chosen(curves, limit.lines)
    charts = list(_charts(curves, shown, key))
    more = len(curves.tasks) - len(shown)
    parts = [tag("div", *charts, class_="charts")]
    if more > 0:
        parts.append(
            tag(
                "p",
                f"The {len(shown)} tasks whose last values are largest are drawn, {more} are not.",
                class_="note",
            )
        )
    parts.append(_table(curves))
    if curves.xi and len(curves.tasks) > 1:
        names = curves.tasks[:XI_TASKS]
        caption = (
            "xi: misalignment of the steps that preferences for one task each would take, at the last step"
        )
        parts.append(square(caption, names, [row[:XI_TASKS] for row in curves.xi[:XI_TASKS]]))
    return tag("div", *parts)


def chosen(curves: Curves, lines: int) -> list[int]:
    """Positions of the tasks that are drawn: all, or those that stand worst at the end."""
    if len(curves.tasks) <= lines or not curves.values:
        return list(range(min(lines, len(curves.tasks))))
    last = [some[-1] if some and math.isfinite(some[-1]) else -math.inf for some in curves.values]
    return sorted(sorted(range(len(last)), key=lambda task: -last[task])[:lines])


def _charts(curves: Curves, shown: Sequence[int], key: str) -> Iterator[Markup]:
    x = curves.steps
    if curves.objective:
        yield line_chart(
            "Objective", x, [Series("objective", curves.objective)], key=f"{key}-o", y_label="objective"
        )
    if curves.values:
        yield line_chart(
            "Value of each task", x, _series(curves, curves.values, shown), key=f"{key}-v", y_label="value"
        )
    if curves.weights:
        series = _series(curves, curves.weights, shown)
        yield line_chart("Weight of each task in the gradient", x, series, key=f"{key}-w", y_label="weight")
    if curves.kappa:
        yield line_chart(
            "kappa: condition number of the tasks' gradients",
            x, [Series("kappa", curves.kappa)], key=f"{key}-k", y_label="kappa (logarithmic)", logarithmic=True,
        )  # fmt: skip


def _series(curves: Curves, values: Sequence[Sequence[float]], shown: Sequence[int]) -> list[Series]:
    return [Series(curves.tasks[task], values[task]) for task in shown]


def _table(curves: Curves) -> Markup:
    """Numbers at some steps: objective, kappa, every task's value and weight."""
    kept = kept_steps(len(curves.steps), TABLE_ROWS)
    tasks = range(min(len(curves.tasks), 24))
    head = ["step", "objective", "kappa"]
    head += [f"{curves.tasks[task]} {what}" for task in tasks for what in ("value", "weight")]
    rows = []
    for at in kept:
        cells = [number(some[at]) if some else number(None) for some in (curves.objective, curves.kappa)]
        for task in tasks:
            cells += [
                number(some[task][at]) if some else number(None) for some in (curves.values, curves.weights)
            ]
        rows.append([str(curves.steps[at]), *cells])
    return table(f"Learning at {len(kept)} of {curves.n_steps:,} steps", head, rows, class_="numbers")
