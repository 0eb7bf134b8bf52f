"""What a kernel may know besides factors and parameters; torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Thresholds = Sequence[Sequence[float]]
"""Per adapter, the magnitudes of its `Method.counts` largest entries: 0 where all are kept, inf where none is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Where and for whom a kernel runs; random masks are drawn from nothing else.

    Args:
        names: adapter names in order.
        site: runtime site name.
        seed: the merge's seed.
        inputs: what the method declared in `needs`, by that word.
        thresholds: with `scope: model`, selected over all sites; None where the kernel selects at its own site.
    """

    names: tuple[str, ...]
    site: str
    seed: int
    inputs: Mapping[str, Any] = field(default_factory=dict)
    thresholds: Thresholds | None = None
