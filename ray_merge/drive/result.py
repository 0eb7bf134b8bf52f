"""What a run did, for whoever started it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """One merge after a run: `done` says whether this run completed it or found it complete."""

    name: str
    id: str
    url: str
    done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run did.

    Args:
        merges: in recipe order.
        units_run: by this run.
        units_adopted: objects of an earlier run that were kept.
        seconds: wall.
        read_bytes: of the base, by all units together.
        decoded_bytes: those of them that became numbers; the others were passed on as they were.
        warnings: what a person should know.
    """

    merges: tuple[MergeResult, ...]
    units_run: int
    units_adopted: int
    seconds: float
    read_bytes: int
    decoded_bytes: int
    warnings: tuple[str, ...]


def summary(result: RunResult) -> dict[str, Any]:
    """The result as JSON-able data."""
    return {
        "merges": [{"name": m.name, "id": m.id, "url": m.url, "done": m.done} for m in result.merges],
        "units_run": result.units_run,
        "units_adopted": result.units_adopted,
        "seconds": round(result.seconds, 3),
        "read_bytes": result.read_bytes,
        "decoded_bytes": result.decoded_bytes,
    }
