"""Progress of a run, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress, for whoever shows it.

    Args:
        kind: "start" (totals are known), "check" (the data were looked at), "select" (thresholds are looked for; units
            are the shards that this round counts), "learn" (one more step of phi; units are steps), "unit" (one more
            done), "merge" (one more published), "command" (of the user's), "warning".
        text: what happened, for a person.
        units: done and all.
        n_bytes: written and all.
    """

    kind: str
    text: str
    units: tuple[int, int] = (0, 0)
    n_bytes: tuple[int, int] = (0, 0)
