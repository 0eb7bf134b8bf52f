"""Axes of charts: round ticks, and numbers -> places in an SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ray_merge.report.markup import Markup, tag

MOST_DECADES = 5
"""Ticks of a logarithmic axis; more decades get fewer ticks."""


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis: `low`..`high` of the data lie at `start`..`end` of the drawing."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float | None:
        """Where a value lies; None where it has no place."""
        if not math.isfinite(value) or (self.logarithmic and value <= 0):
            return None
        low, high, here = (
            (math.log10(one) for one in (self.low, self.high, value))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        share = min(1.0, max(0.0, (here - low) / (high - low)))
        return self.start + share * (self.end - self.start)


def scale(values: Iterable[float], start: float, end: float, *, logarithmic: bool = False) -> Scale:
    """An axis that has room for all finite values (of a logarithmic one: all above 0)."""
    known = [one for one in values if math.isfinite(one) and (one > 0 or not logarithmic)]
    low, high = (min(known), max(known)) if known else (1.0, 10.0) if logarithmic else (0.0, 1.0)
    if logarithmic:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        step = math.ceil((last - first) / MOST_DECADES)
        powers = [10.0**power for power in range(first, last + 1, step)]
        return Scale(10.0**first, min(10.0**last, 1e308), start, end, tuple(powers), True)
    ticks = round_ticks(low, high)
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def round_ticks(low: float, high: float, count: int = 4) -> tuple[float, ...]:
    """Some `count` round numbers, the first not above `low` and the last not below `high`."""
    room = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(room / count))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if room / (factor * power) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(
        round(index * step, 12 - math.floor(math.log10(step)))
        for index in range(first, max(last, first + 1) + 1)
    )


def tick_text(value: float) -> str:
    """A round number without zeros at its end."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6f}".rstrip("0").rstrip(".")


def axes(x: Scale, y: Scale, x_label: str, y_label: str) -> list[Markup]:
    """Grid lines, ticks and labels of a chart whose y axis stands at the left."""
    parts = []
    for tick in y.ticks:
        place = y.at(tick)
        if place is not None:
            parts.append(line(x.start, place, x.end, place, "grid"))
            parts.append(text(x.start - 6, place + 4, tick_text(tick), "tick end"))
    for tick in x.ticks:
        place = x.at(tick)
        if place is not None:
            parts.append(line(place, y.start, place, y.start + 4, "grid"))
            parts.append(text(place, y.start + 17, tick_text(tick), "tick middle"))
    parts.append(text((x.start + x.end) / 2, y.start + 34, x_label, "label middle"))
    parts.append(text(x.start - 40, y.end - 12, y_label, "label"))
    return parts


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("path", class_=class_, d=f"M{place(x1)} {place(y1)}L{place(x2)} {place(y2)}")


def text(x: float, y: float, content: str, class_: str) -> Markup:
    """One line of text."""
    return tag("text", content, x=place(x), y=place(y), class_=class_)


def place(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def path(points: Sequence[tuple[float | None, float | None]]) -> str:
    """The `d` of a line through points; it breaks where one has no place."""
    parts, drawing = [], False
    for x, y in points:
        if x is None or y is None:
            drawing = False
            continue
        parts.append(f"{'L' if drawing else 'M'}{place(x)} {place(y)}")
        drawing = True
    return "".join(parts)
