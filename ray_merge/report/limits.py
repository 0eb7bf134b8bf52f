"""How much a report shows, so that it stays a page: 200 merges of 10,000 sites make some 7 MB.

Everything here is a bound of what is drawn; what is left out is aggregated or counted, and the page says so.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_CELLS = 60_000
"""Of all heat maps together, some 30 bytes each."""

MAX_POINTS = 60_000
"""Of all learning curves together, some 11 bytes each."""

MAX_FILES = 4_000
"""Rows of all lists of files together."""

FIGURES = 4
"""Heat maps of a merge."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one merge may show.

    Args:
        rows: of a heat map; more blocks are put together.
        columns: of a heat map; more kinds of module are put together.
        points: of one curve.
        lines: of one chart.
        files: of a list of files.
        adapters: of a table of adapters.
    """

    rows: int
    columns: int
    points: int
    lines: int
    files: int
    adapters: int


def limits(n_merges: int) -> Limits:
    """What each of so many merges may show."""
    many = max(1, n_merges)
    return Limits(
        rows=min(64, max(8, MAX_CELLS // (many * FIGURES * 12))),
        columns=12,
        points=min(120, max(12, MAX_POINTS // (many * 18))),
        lines=8,
        files=min(40, max(5, MAX_FILES // many)),
        adapters=min(100, max(10, MAX_FILES // many)),
    )
