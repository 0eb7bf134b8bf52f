"""What a night did, as data: JSON beside an HTML page, put once under a name with the date and the attempt.

<folder>/nightly-2026-01-31-1.json, nightly-2026-01-31-1.html
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from ray_merge.errors import Refusal, RunFailed
from ray_merge.nightly.entries import Entry
from ray_merge.nightly.page import page
from ray_merge.storage.commit import pretty_json
from ray_merge.storage.store import open_store

DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
NAME = re.compile(rf"nightly-{DAY.pattern}-[0-9]+\.json")
DONE = ("complete", "skipped")

MAX_READ = 10
"""Summaries that are read for what earlier nights made; a night that was stopped early knows little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One attempt at a night.

    Args:
        date: UTC day.
        recipes: the folder.
        started: UTC, ISO 8601.
        seconds: wall.
        stopped: the signal that ended it early; empty where none did.
        entries: one per recipe, by name.
        attempt: of that day, from 1.
        url: of the JSON; empty before it is written.
    """

    date: str
    recipes: str
    started: str
    seconds: float
    stopped: str
    entries: Sequence[Entry]
    attempt: int = 0
    url: str = ""

    @property
    def complete(self) -> bool:
        """Whether every merge of every recipe is there."""
        return all(entry.state in DONE for entry in self.entries)

    @property
    def only_refusals_left(self) -> bool:
        """Whether all that can be made is there, so that another try would find the same."""
        return not self.stopped and all(entry.state in (*DONE, "refused") for entry in self.entries)

    def sentence(self) -> str:
        """Why the night is not complete."""
        if self.stopped:
            return f"stopped by {self.stopped}; the same command makes the rest"
        bad = [entry for entry in self.entries if entry.state not in DONE]
        why = f": {bad[0].why}" if bad and bad[0].why else ""
        return f"{len(bad)} of {len(self.entries)} recipe(s) are not complete, first {bad[0].recipe}{why}"

    def document(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "date": self.date,
            "attempt": self.attempt,
            "recipes": self.recipes,
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "stopped": self.stopped,
            "complete": self.complete,
            "counts": {
                "recipes": dict(Counter(entry.state for entry in self.entries)),
                "merges": dict(Counter(merge.state for entry in self.entries for merge in entry.merges)),
            },
            "cost": {
                "unit_seconds": round(sum(entry.unit_seconds for entry in self.entries), 3),
                "units": sum(entry.units for entry in self.entries),
                "written_bytes": sum(entry.written_bytes for entry in self.entries),
                "read_bytes": sum(entry.read_bytes for entry in self.entries),
            },
            "results": [_row(entry) for entry in self.entries],
        }


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "recipe": entry.recipe,
        "state": entry.state,
        "why": entry.why,
        "base": entry.base,
        "seconds": round(entry.seconds, 3),
        "unit_seconds": round(entry.unit_seconds, 3),
        "units": entry.units,
        "written_bytes": entry.written_bytes,
        "read_bytes": entry.read_bytes,
        "merges": [
            {
                "name": merge.name,
                "id": merge.id,
                "url": merge.url,
                "date": merge.date,
                "state": merge.state,
            }
            for merge in entry.merges
        ],
    }


def known_days(folder: str, date: str) -> dict[str, str]:
    """Merge id -> day under which it is complete, as the summaries of earlier nights say; hints, to be looked at.

    Every summary names what it skipped and under which day that is, so the last few know all that is still asked for.
    """
    store = open_store(folder)
    try:
        names = [info.path for info in store.list() if NAME.fullmatch(info.path)]
    except Refusal:
        return {}  # a folder that may be written and not listed: no hints, then
    before = sorted(name for name in names if name.split("nightly-")[1][:10] <= date)[-MAX_READ:]
    days: dict[str, str] = {}
    for name in before:
        try:
            rows = json.loads(store.read(name))["results"]
            merges = [merge for row in rows for merge in row["merges"]]
            days |= {
                one["id"]: one["date"] for one in merges if one["state"] in DONE and _is_before(one, date)
            }
        except (ValueError, TypeError, LookupError, RecursionError):
            continue  # somebody's own file: it costs a look at each earlier day, no more
    return days


def _is_before(merge: Mapping[str, str], date: str) -> bool:
    return DAY.fullmatch(merge["date"]) is not None and merge["date"] < date


def put_summary(summary: Summary, folder: str) -> Summary:
    """Write JSON and page under the first attempt of that date that is free.

    Raises:
        RunFailed: the store refuses; the merges themselves are not touched by that.
    """
    try:
        store = open_store(folder)
        for attempt in count(1):
            name = f"nightly-{summary.date}-{attempt}"
            numbered = replace(summary, attempt=attempt, url=f"{store.url}/{name}.json")
            document = numbered.document()
            if store.put_if_absent(f"{name}.json", pretty_json(document), {}):
                store.put_if_absent(f"{name}.html", page(document).encode(), {})
                return numbered
    except Refusal as error:
        raise RunFailed(
            f"the summary cannot be written: {error}; name another folder by --summary"
        ) from error
    raise AssertionError("count() does not end")
