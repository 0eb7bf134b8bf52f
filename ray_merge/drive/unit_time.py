"""The part of a receipt that tells time, as far as its numbers are ones: receipts may have been edited or damaged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ray_merge.spec import Receipt

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
