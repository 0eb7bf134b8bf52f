"""The catalogue: which scenarios there are, each fully said by a few words and a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from recipes import RECIPES

from random_faults import KINDS, WAITING

MIXED = tuple(kind for kind in KINDS if kind not in ("false412", *WAITING))

LOCAL_COUNTS = {
    **{f"fault-{kind}": 18 for kind in KINDS},
    "fault-mixed": 36,
    "kill-driver-s3": 50,
    "kill-driver-disk": 24,
    "kill-server": 8,
    "preempted": 12,
    "disk-full": 16,
    "memory-limit": 12,
    "two-drivers": 18,
    "clock": 10,
    "gc": 12,
}
"""Scenarios of the local engine by kind: 468."""

RAY_COUNTS = {
    "ray-fault-mixed": 24,
    "ray-fault-lose": 8,
    "ray-fault-reset": 8,
    "ray-kill-worker": 12,
    "ray-kill-raylet": 3,
    "ray-preempted-node": 2,
    "ray-kill-driver": 2,
    "ray-kill-server": 1,
}
"""Through Ray on one kept cluster of three nodes: 60, of which 17 kill a worker, a raylet or the driver."""

FURTHER_COUNTS = {
    "parts": {"fault-mixed": 3, "fault-lose": 1, "fault-cut_request": 1, "kill-driver-s3": 2, "gc": 1},
    "moments": {
        "fault-mixed": 2,
        "kill-driver-s3": 2,
        "kill-driver-disk": 1,
        "two-drivers": 1,
        "disk-full": 1,
        "preempted": 1,
    },
    "learned": {
        "fault-mixed": 2,
        "kill-driver-s3": 3,
        "kill-driver-disk": 1,
        "two-drivers": 1,
        "gc": 1,
        "ray-out-of-memory": 1,
    },
    "sums": {"ray-out-of-memory": 1},
}
"""Recipe -> scenarios by kind, which come after all others: 24 of the local engine, 2 through Ray."""


@dataclass(frozen=True)
class Scenario:
    """One disturbed run.

    Args:
        number: its place in the catalogue.
        kind: a key of LOCAL_COUNTS or RAY_COUNTS, or one of FURTHER_COUNTS.
        recipe: a key of RECIPES or FURTHER.
        store: "s3" or "disk", for inputs and output.
        rate: share of requests that fail; 0 where no request does.
        seed: decides everything else (moments, which process, limits).
    """

    number: int
    kind: str
    recipe: str
    store: str
    rate: float
    seed: str

    @property
    def engine(self) -> str:
        return _engine(self.kind)

    @property
    def faults(self) -> tuple[str, ...]:
        """Kinds of storage faults in it."""
        name = self.kind.partition("fault-")[2]
        return MIXED if name == "mixed" else (name,) if name else ()

    @property
    def rng(self) -> random.Random:
        return random.Random(self.seed)

    def line(self) -> str:
        rate = f" {self.rate:.0%} of requests" if self.rate else ""
        return f"{self.number} {self.kind} {self.store} {self.recipe}{rate} seed {self.seed!r}"


def catalogue(seed: int, engine: str = "both") -> list[Scenario]:
    """All scenarios of an engine ("local", "ray" or "both"): first those whose recipe is drawn.

    Kinds are taken in turns, so that any first part has some of all.
    """
    counts = {"local": LOCAL_COUNTS, "ray": RAY_COUNTS, "both": {**LOCAL_COUNTS, **RAY_COUNTS}}[engine]
    rows: list[tuple[str, str | None]] = [(kind, None) for kind in _in_turns(counts)]
    rows += [(kind, recipe) for recipe, some in FURTHER_COUNTS.items() for kind in _in_turns(some)]
    if engine != "both":
        rows = [(kind, recipe) for kind, recipe in rows if _engine(kind) == engine]
    return [
        _scenario(number, kind, recipe, f"{seed}-{kind}-{number}")
        for number, (kind, recipe) in enumerate(rows)
    ]


def _engine(kind: str) -> str:
    return "ray" if kind.startswith("ray-") else "local"


def _in_turns(counts: Mapping[str, int]) -> Iterator[str]:
    for turn in range(max(counts.values())):
        yield from (kind for kind, count in counts.items() if count > turn)


def _scenario(number: int, kind: str, recipe: str | None, seed: str) -> Scenario:
    rng = random.Random(f"catalogue {seed}")
    store = "s3"
    if kind in ("kill-driver-disk", "memory-limit"):
        store = "disk"
    elif kind in ("disk-full", "two-drivers", "preempted", "clock", "gc") and recipe != "parts":
        store = rng.choice(["s3", "disk"])
    rates = [0.01, 0.05, 0.1, 0.2, 0.3]
    if kind.partition("fault-")[2] in WAITING:  # each costs a time limit
        rates = rates[:2]
    elif recipe is not None:  # their runs make twice as many requests, one after the other
        rates = rates[:3]
    rate = rng.choice(rates) if "fault-" in kind else 0.0
    return Scenario(number, kind, recipe or rng.choice(sorted(RECIPES)), store, rate, seed)
