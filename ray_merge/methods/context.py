"""What a kernel may know besides factors and parameters; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Where and for whom a kernel runs; random masks are drawn from nothing else.

    Args:
        names: adapter names in order.
        site: runtime site name.
        seed: the merge's seed.
        inputs: what the method declared in `needs`, by that word.
    """

    names: tuple[str, ...]
    site: str
    seed: int
    inputs: Mapping[str, Any] = field(default_factory=dict)
