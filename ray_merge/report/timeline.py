"""When which worker did what: one bar per unit, one row per worker, and the seconds by phase as a table."""

from __future__ import annotations

import datetime
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from ray_merge.drive.unit_time import UnitTime
from ray_merge.report.axes import line, place, round_ticks, text, tick_text
from ray_merge.report.charts import look
from ray_merge.report.markup import Markup, number, percent, scrolling, seconds, table, tag
from ray_merge.report.times import lanes, phase_names, stretches
from ray_merge.show_progress import human_bytes

WIDTH, ROW, LEFT, RIGHT, TOP, BOTTOM = 900, 18, 170, 14, 8, 38

MAX_ROWS = 40
"""Rows of one chart; workers beyond are in the table."""

MAX_BARS = 400
"""Of one chart; more units than that are drawn as the time in which a worker was busy."""

MAX_STRETCHES = 6
"""The latest ones are drawn; a nightly output has hundreds."""

MAX_WORKERS = 200
"""Rows of the table."""


def timeline(units: Sequence[UnitTime]) -> Markup:
    """The whole section: charts of the latest stretches of work, and tables."""
    if not units:
        return tag("p", "There are no receipts that tell times.")
    names = phase_names(units)
    found = stretches(units)
    drawn = found[-MAX_STRETCHES:]
    parts: list[Markup] = [_words(units, found, drawn)]
    parts += [_chart(some, names, f"time{index}") for index, some in enumerate(drawn)]
    parts.append(_workers(units, names))
    return tag("div", *parts)


def _words(units: Sequence[UnitTime], found: Sequence[object], drawn: Sequence[object]) -> Markup:
    lines = [
        "A unit counts once, however many objects it published. Rows of one "
        "worker overlap because it publishes one unit while it computes the next. Clocks are the workers' own."
    ]
    unknown = sum(not one.began for one in units)
    if unknown:
        lines.append(
            f"{unknown:,} of {len(units):,} unit(s) do not say when they began and are in the table only."
        )
    if len(found) > len(drawn):
        lines.append(
            f"{len(found):,} stretches of work are apart by 15 minutes or more; the last {len(drawn)} are drawn."
        )
    return tag("p", " ".join(lines), class_="note")


def _chart(units: Sequence[UnitTime], names: Sequence[str], key: str) -> Markup:
    start, end = units[0].began, max(one.end for one in units)
    span = max(end - start, 1e-3)
    rows = lanes(units)
    shown = rows[:MAX_ROWS]
    height = TOP + ROW * len(shown) + BOTTOM
    ticks = [tick for tick in round_ticks(0.0, span, 8) if tick <= span * 1.0001]
    parts = []
    for tick in ticks:
        x = LEFT + tick / span * (WIDTH - LEFT - RIGHT)
        parts.append(line(x, TOP, x, TOP + ROW * len(shown), "grid"))
        parts.append(text(x, height - 21, f"{tick_text(tick)} s", "tick middle"))
    before = ""
    for index, (worker, row) in enumerate(shown):
        y = TOP + ROW * index
        if worker != before:
            parts.append(text(LEFT - 8, y + 13, _short(worker), "tick end"))
        before = worker
        parts += _bars(row, names, start, span, y, few=len(units) <= MAX_BARS)
    when = _utc(start)
    parts.append(text((LEFT + WIDTH) / 2, height - 4, f"seconds since {when}", "label middle"))
    title = (
        f"{len(units):,} unit(s) by {len({one.worker for one in units})} worker(s), {when}, {seconds(span)}"
    )
    svg = tag(
        "svg",
        tag("title", title, id=f"{key}-t"),
        tag("desc", f"One row per worker, one bar per unit. {_busy(units, span)}", id=f"{key}-d"),
        *parts,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
        class_="chart wide",
    )
    more = f"; {len(rows) - MAX_ROWS} more rows are not drawn" if len(rows) > MAX_ROWS else ""
    legend = _legend(names) if len(units) <= MAX_BARS else tag("small", "bars: a worker was busy")
    return tag("figure", scrolling(svg, "timeline"), tag("figcaption", title, more, legend))


def _busy(units: Sequence[UnitTime], span: float) -> str:
    workers = {one.worker for one in units}
    at_once = math.fsum(one.seconds for one in units) / span
    return f"On average {number(at_once)} units at once on {len(workers)} worker(s)."


def _bars(
    row: Sequence[UnitTime], names: Sequence[str], start: float, span: float, y: float, *, few: bool
) -> Iterator[Markup]:
    pixels = (WIDTH - LEFT - RIGHT) / span
    if not few:
        for begin, stop in _joined(row, 1.0 / pixels):
            yield _bar(LEFT + (begin - start) * pixels, y, (stop - begin) * pixels, "c0", None)
        return
    for one in row:
        x = LEFT + (one.began - start) * pixels
        parts = []
        for phase in names:
            width = one.phases.get(phase, 0.0) * pixels
            if width > 0.05:
                parts.append(_bar(x, y, width, f"c{names.index(phase) % 6}", None))
            x += width
        yield tag("g", tag("title", _unit_words(one)), *parts)


def _bar(x: float, y: float, width: float, colour: str, hint: Markup | None) -> Markup:
    return tag(
        "rect", hint, x=place(x), y=place(y + 2), width=place(max(width, 0.3)), height=ROW - 4, class_=f"unit {colour}"
    )  # fmt: skip


def _joined(row: Sequence[UnitTime], gap: float) -> Iterator[tuple[float, float]]:
    """Times in which a row is busy; pauses shorter than a pixel do not count."""
    begin, stop = row[0].began, row[0].end
    for one in row[1:]:
        if one.began - stop > gap:
            yield begin, stop
            begin = one.began
        stop = max(stop, one.end)
    yield begin, stop


def _unit_words(one: UnitTime) -> str:
    phases = ", ".join(f"{phase} {seconds(value)}" for phase, value in one.phases.items())
    return (
        f"{one.unit}: {seconds(one.seconds)} ({phases}); {one.objects} object(s), {human_bytes(one.n_bytes)}"
    )


def _legend(names: Sequence[str]) -> Markup:
    entries = []
    for index, name in enumerate(_words_of(names)):
        box = tag("rect", width=14, height=10, class_=f"unit {look(index)}")
        entries.append(
            tag("li", tag("svg", box, viewBox="0 0 14 10", aria_hidden="true", class_="box"), " ", name)
        )
    return tag("ul", *entries, class_="legend")


def _words_of(names: Sequence[str]) -> list[str]:
    """Phases as people read them: units of exported adapters and of emr tell their whole time alone."""
    return ["not split" if name == "total" else name for name in names]


def _workers(units: Sequence[UnitTime], names: Sequence[str]) -> Markup:
    by_worker: dict[str, list[UnitTime]] = defaultdict(list)
    for one in units:
        by_worker[one.worker].append(one)
    rows = [
        _row(worker or "not named", by_worker[worker], names) for worker in sorted(by_worker)[:MAX_WORKERS]
    ]
    rows.append(_row("all", units, names))
    left_out = len(by_worker) - MAX_WORKERS
    more = f"; {left_out} more worker(s) are in the last row only" if left_out > 0 else ""
    head = ["worker", "units", "published", "base read", "busy", *_words_of(names)]
    return table(f"Seconds by worker and phase{more}", head, rows, class_="numbers")


def _row(name: str, units: Sequence[UnitTime], names: Sequence[str]) -> list[object]:
    total = math.fsum(one.seconds for one in units)
    phases = [math.fsum(one.phases.get(phase, 0.0) for one in units) for phase in names]
    return [
        name,
        f"{len(units):,}",
        human_bytes(sum(one.n_bytes for one in units)),
        human_bytes(sum(one.read for one in units)),
        seconds(total),
        *(f"{seconds(one)} ({percent(one / total)})" if total else seconds(one) for one in phases),
    ]


def _short(worker: str) -> str:
    return worker if len(worker) <= 24 else f"...{worker[-21:]}"


def _utc(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
