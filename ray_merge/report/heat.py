"""A grid as a heat map that is a table: colours for the eye, numbers for everybody, one caption with the range.

Colours go from the page's own to a deep (dark page: bright) blue in ten steps of even lightness, so they are told apart
without colour vision and on paper; every cell has its number on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ray_merge.report.markup import NOTHING, Markup, breakable, number, percent, scrolling, tag
from ray_merge.report.sites import FIGURES, Figure, Grid

STEPS = 10
DECIMALS = 12
COMBINED = {
    "root": "cells of several sites: root of the sum of squares",
    "most": "cells of several sites: the largest",
    "mean": "cells of several sites: their mean",
}


def heat_maps(grids: Sequence[Grid]) -> Iterator[Markup]:
    """One map for each figure that is known, of every list of blocks."""
    for grid in grids:
        for figure in FIGURES:
            if figure.key in grid.values:
                yield heat_map(grid, figure)


def heat_map(grid: Grid, figure: Figure) -> Markup:
    """One map."""
    rows = grid.values[figure.key]
    known = [one for row in rows for one in row if one is not None]
    span = (0.0 if figure.from_zero else min(known, default=0.0), max(known, default=0.0))
    shown = percent if figure.share else number
    words = f"{shown(min(known, default=None))} to {shown(max(known, default=None))}"
    several = f"; {COMBINED[figure.combine]}, at most {grid.most:,}" if grid.most > 1 else ""
    what = tag("small", figure.what, several)
    caption = tag("caption", tag("b", figure.title), " ", tag("code", grid.title), f": {words}", what)
    head = tag(
        "tr",
        tag("th", "block", scope="col"),
        *(tag("th", breakable(one), scope="col") for one in grid.columns),
    )
    body = (
        tag("tr", tag("th", label, scope="row"), *(_cell(one, span, shown(one)) for one in row))
        for label, row in zip(grid.rows, rows, strict=True)
    )
    whole = tag("table", caption, tag("thead", head), tag("tbody", *body), class_="heat")
    return tag(
        "div", scrolling(whole, f"{figure.title} by block and module"), _scale(shown(span[0]), shown(span[1]))
    )


def _cell(value: float | None, span: tuple[float, float], text: str) -> Markup:
    return tag("td", text, class_=step_class(value, span))


def step_class(value: float | None, span: tuple[float, float]) -> str:
    """The class of a cell's colour: h0 for the low end of `span`, h9 for the high one, hx where nothing is known."""
    if value is None or not math.isfinite(value):
        return "hx"
    low, high = span
    share = (value - low) / (high - low) if high > low else 0.0
    return f"h{min(STEPS - 1, max(0, int(share * STEPS)))}"


def _scale(low: str, high: str) -> Markup:
    """The ten colours with the numbers at their ends."""
    steps = (tag("i", class_=f"h{step}") for step in range(STEPS))
    bar = tag("span", *steps, class_="bar", aria_hidden="true")
    unknown = tag(
        "span", tag("i", class_="hx", aria_hidden="true"), f" {NOTHING} not known", class_="unknown"
    )
    return tag("p", tag("span", low), bar, tag("span", high), unknown, class_="scale")


def square(caption: str, names: Sequence[str], rows: Sequence[Sequence[float]]) -> Markup:
    """A heat map of tasks by tasks, of values that are 0 at least."""
    # What is 0 but for the last digits of float64 is shown as 0.
    given = [[round(one, DECIMALS) + 0.0 for one in row] for row in rows]
    span = (0.0, max((one for row in given for one in row if math.isfinite(one)), default=0.0))
    head = tag(
        "tr", tag("th", "task", scope="col"), *(tag("th", breakable(name), scope="col") for name in names)
    )
    body = (
        tag("tr", tag("th", name, scope="row"), *(_cell(one, span, number(one)) for one in row))
        for name, row in zip(names, given, strict=True)
    )
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_="heat")
    return tag("div", scrolling(whole, caption), _scale(number(span[0]), number(span[1])))
