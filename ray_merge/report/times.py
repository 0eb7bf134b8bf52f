"""Receipts -> which worker did which unit when. A unit makes an object for each merge of its group: it counts once.

Workers' clocks may differ; a unit stands where its own worker's clock says.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ray_merge.drive.unit_time import UnitTime

IDLE_SECONDS = 900.0
"""A pause of all workers that begins another stretch of work: the next night, or a run that was taken up again."""


def units_of(times: Iterable[UnitTime]) -> list[UnitTime]:
    """One entry per unit that ran, by beginning: the seconds of its last receipt, the bytes of all."""
    grouped: dict[tuple[str, str, float], list[UnitTime]] = defaultdict(list)
    for one in times:
        grouped[one.worker, one.unit, one.began].append(one)
    made = [
        replace(
            max(some, key=lambda one: one.seconds),
            n_bytes=sum(one.n_bytes for one in some),
            read=max(one.read for one in some),
            objects=len(some),
        )
        for some in grouped.values()
    ]
    return sorted(made, key=lambda one: (one.began, one.worker, one.unit))


def stretches(units: Sequence[UnitTime]) -> list[list[UnitTime]]:
    """Units whose beginning is known, cut where no worker did anything for `IDLE_SECONDS`."""
    found: list[list[UnitTime]] = []
    busy_until = -math.inf
    for one in (unit for unit in units if unit.began):
        if one.began - busy_until > IDLE_SECONDS:
            found.append([])
        found[-1].append(one)
        busy_until = max(busy_until, one.end)
    return found


def lanes(units: Sequence[UnitTime]) -> list[tuple[str, list[UnitTime]]]:
    """Rows of units that do not overlap: a worker publishes one unit while it computes the next."""
    by_worker: dict[str, list[list[UnitTime]]] = defaultdict(list)
    for one in units:
        rows = by_worker[one.worker]
        free = next((row for row in rows if row[-1].end <= one.began + 1e-3), None)
        if free is None:
            rows.append([one])
        else:
            free.append(one)
    return [(worker, row) for worker in sorted(by_worker) for row in by_worker[worker]]


def phase_names(units: Iterable[UnitTime]) -> list[str]:
    """Phases that occur, in the order of a unit."""
    order = ("read", "merge", "diagnose", "write", "upload", "total")
    there = {phase for one in units for phase in one.phases}
    return [*(one for one in order if one in there), *sorted(there.difference(order))]
