"""Receipts -> which worker did which unit when. A unit makes an object for each merge of its group: it counts once.

Workers' clocks may differ; a unit stands where its own worker's clock says.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ray_merge.spec import Receipt

IDLE_SECONDS = 900.0
"""A pause of all workers that begins another stretch of work: the next night, or a run that was taken up again."""


LATEST = 1e11
"""Seconds; no unit takes so long (3000 years), and no clock shows it. A page of such numbers cannot be drawn."""


def is_size(value: object) -> bool:
    """Whether this can be the number of bytes of an object."""
    return type(value) is int and 0 <= value < 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTime:
    """One unit as its receipts tell it.

    Args:
        unit: its id.
        worker: host and process.
        began: seconds since 1970; 0 where it was not written down.
        phases: seconds by phase.
        n_bytes: published.
        read: bytes of the base.
        objects: how many it published.
    """

    unit: str
    worker: str
    began: float
    phases: Mapping[str, float]
    n_bytes: int
    read: int
    objects: int = 1

    @property
    def seconds(self) -> float:
        """From its beginning to its last receipt."""
        return math.fsum(self.phases.values())

    @property
    def end(self) -> float:
        """When that was."""
        return self.began + self.seconds


def unit_time(receipt: Receipt) -> UnitTime | None:
    """The part of a receipt that tells time; None where its numbers are none."""
    try:
        phases = {str(phase): float(value) for phase, value in receipt.seconds.items() if 0 <= value < LATEST}
        if not is_size(receipt.n_bytes):
            return None
        began = float(receipt.began)
        return UnitTime(
            unit=str(receipt.unit),
            worker=str(receipt.worker),
            began=began if math.isfinite(began) and 0 < began < LATEST else 0.0,
            phases=phases,
            n_bytes=receipt.n_bytes,
            read=read if is_size(read := receipt.unit_bytes.get("read", 0)) else 0,
        )
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None


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
