"""Progress on stderr: live bars on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from ray_merge import logs

if TYPE_CHECKING:
    from ray_merge.drive.events import Event

BARS = {"unit": ("merging", "units"), "select": ("selecting", "shards"), "learn": ("learning", "steps")}
"""Kind of the events that come in numbers -> name of their bar, and what is counted."""

PLAIN_SECONDS = 5.0
"""Plain progress lines come at most this often; a nightly log stays readable."""


def human_bytes(n_bytes: float) -> str:
    """Bytes with a decimal unit: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


class Progress:
    """Shows the events of a run; call it with each one."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live: RichProgress | None = None
        self._tasks: dict[str, Any] = {}
        self._began = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not logs.is_json():
            self._live = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[units]}"),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._live is not None:
            self._show_live(self._live, event)
        else:
            self._show_plain(event)

    def _show_live(self, live: RichProgress, event: Event) -> None:
        if not _is_one_of_many(event):
            live.console.print(_sentence(event))
            if not any((*event.units, *event.n_bytes)):  # it moves no bar
                return
        bar, word = BARS.get(event.kind, BARS["unit"])
        amount = event.n_bytes if bar == "merging" else event.units
        units = f"{event.units[0]}/{event.units[1]} {word}"
        if bar not in self._tasks:
            self._tasks[bar] = live.add_task(bar, total=amount[1] or None, units=units)
        text = bar if bar == "merging" else event.text
        live.update(
            self._tasks[bar], completed=amount[0], total=amount[1] or None, units=units, description=text
        )

    def _show_plain(self, event: Event) -> None:
        now = time.monotonic()
        finished = event.units[0] == event.units[1]
        if event.kind == "unit" and self._first is None:
            self._first = (
                now,
                event.n_bytes[0],
            )  # the clock starts here: before it Ray and torch were starting
        if _is_one_of_many(event) and not finished and now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        line = self._unit_line(event, now) if event.kind == "unit" else _sentence(event)
        level = logging.WARNING if event.kind == "warning" else logging.INFO
        logs.say(line, level=level, **_fields(event), seconds=round(now - self._began, 3))

    def _unit_line(self, event: Event, now: float) -> str:
        done, total = event.n_bytes
        if not total:
            return f"{event.units[0]}/{event.units[1]} units, last {event.text}"
        line = f"{event.units[0]}/{event.units[1]} units, {human_bytes(done)} of {human_bytes(total)}"
        since, before = self._first or (now, done)
        rate = (done - before) / (now - since) if now > since else 0.0
        if not rate:
            return line
        left = f", {(total - done) / rate:.0f} s left" if done < total else ""
        return f"{line}, {human_bytes(rate)}/s{left}"


def _is_one_of_many(event: Event) -> bool:
    return event.kind in BARS and any(event.units)


def _sentence(event: Event) -> str:
    if event.kind == "learn":
        return f"step {event.units[0]}/{event.units[1]} of {event.text}"
    if event.kind == "select" and any(event.units):
        return f"{event.text}: {event.units[0]}/{event.units[1]} shards"
    words = {"start": "starting: ", "merge": "published ", "unit": "done: ", "warning": "warning: "}
    return words.get(event.kind, "") + event.text


def _fields(event: Event) -> dict[str, Any]:
    """What the event says beside its sentence."""
    counted = any(event.units)
    return {
        "unit": event.text if event.kind == "unit" else None,
        "merge": event.text if event.kind == "merge" else None,
        "done": event.units[0] if counted else None,
        "of": event.units[1] if counted else None,
        "bytes": event.n_bytes[0] if any(event.n_bytes) else None,
    }
