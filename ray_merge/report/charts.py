"""Line charts and scatter plots as inline SVG: a title and a description for who does not see, a legend in words.

A series is told from another by colour, by dash or mark, and by name; a table with the numbers stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ray_merge.report.axes import axes, path, place, scale, text
from ray_merge.report.markup import Markup, number, tag

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 30, 44
COLOURS = 6
"""Of series (page style); more series get dashes."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: a name and its values over the chart's x."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One point of a scatter plot.

    Args:
        x: right.
        y: up.
        label: stands beside it; empty for none.
        title: what the pointer shows.
        best: no other point beats it.
    """

    x: float
    y: float
    label: str
    title: str
    best: bool


def line_chart(
    title: str,
    x: Sequence[int],
    series: Sequence[Series],
    *,
    key: str,
    y_label: str,
    logarithmic: bool = False,
) -> Markup:
    """Lines over steps.

    Args:
        title: of the figure.
        x: the steps.
        series: at most some 8; each has as many values as there are steps.
        key: unique on the page.
        y_label: what the values are.
        logarithmic: y axis.
    """
    across = scale((float(one) for one in (x or [0])), LEFT, WIDTH - RIGHT)
    up = scale((one for some in series for one in some.values), HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    lines = []
    for number_, one in enumerate(series):
        given = [(across.at(float(step)), up.at(value)) for step, value in zip(x, one.values, strict=True)]
        lines.append(tag("path", d=path(given), class_=f"line {look(number_)}"))
    drawn = _svg(title, _says(title, x, series), key, [*axes(across, up, "step", y_label), *lines])
    names = [(look(number_), one.name) for number_, one in enumerate(series)]
    return tag("figure", drawn, tag("figcaption", title, _legend(names) if len(series) > 1 else None))


def look(number_: int) -> str:
    """The classes of a series: colour, then dash."""
    return f"c{number_ % COLOURS} d{number_ // COLOURS % 3}"


def _says(title: str, x: Sequence[int], series: Sequence[Series]) -> str:
    ends = [
        f"{one.name} from {number(one.values[0])} to {number(one.values[-1])}" for one in series if one.values
    ]
    steps = f"steps {x[0]} to {x[-1]}" if x else "no steps"
    return f"{title}, {steps}: {'; '.join(ends)}."


def _legend(names: Sequence[tuple[str, str]]) -> Markup:
    entries = []
    for classes, name in names:
        sample = tag(
            "svg", tag("path", d="M0 5H26", class_=f"line {classes}"), viewBox="0 0 26 10", aria_hidden="true"
        )
        entries.append(tag("li", sample, " ", name))
    return tag("ul", *entries, class_="legend")


def scatter(
    title: str, dots: Sequence[Dot], *, key: str, x_label: str, y_label: str, note: str = ""
) -> Markup:
    """Points; those that no other beats are filled."""
    known = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    across = scale((dot.x for dot in known), LEFT, WIDTH - RIGHT)
    up = scale((dot.y for dot in known), HEIGHT - BOTTOM, TOP)
    marks: list[Markup] = []
    taken: list[tuple[float, float]] = []
    for dot in sorted(known, key=lambda dot: not dot.best):
        x, y = across.at(dot.x), up.at(dot.y)
        assert x is not None
        assert y is not None
        marks.append(_mark(dot, x, y))
        left = x > WIDTH - 60
        spot = (x - 12 if left else x + 12, y)
        # A label on another one is worse than none: the table has all of them.
        if dot.label and all(abs(spot[0] - a) > 20 or abs(spot[1] - b) > 11 for a, b in taken):
            taken.append(spot)
            marks.append(text(x - 8 if left else x + 8, y + 4, dot.label, "tick end" if left else "tick"))
    says = f"{title}: {len(known)} points; {x_label} across, {y_label} up. {note}"
    drawn = _svg(title, says, key, [*axes(across, up, x_label, y_label), *marks])
    return tag("figure", drawn, tag("figcaption", title, tag("small", note) if note else None))


def _mark(dot: Dot, x: float, y: float) -> Markup:
    hint = tag("title", dot.title)
    if dot.best:
        around = f"M{place(x)} {place(y - 6)}l6 6l-6 6l-6 -6Z"
        return tag("path", hint, d=around, class_="dot best")
    return tag("circle", hint, cx=place(x), cy=place(y), r=4, class_="dot")


def _svg(title: str, says: str, key: str, parts: Sequence[Markup]) -> Markup:
    named = f"{key}-t {key}-d"
    return tag(
        "svg",
        tag("title", title, id=f"{key}-t"),
        tag("desc", says, id=f"{key}-d"),
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=named,
        class_="chart",
    )
