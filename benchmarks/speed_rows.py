"""The table of issue 4 as data: which contender of ours, against whom, and what must hold.

Owns: bars and how each is computed from runs. Merge_speed.py makes the runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import contenders
from contenders import COPIES, Bench, Run

Runs = Mapping[str, Sequence[Run]]
"""Contender -> its runs, one per round; mergekit has one in all."""

MEMORY_LIMIT_BYTES = 1.5e9
FLAT = 1.1  # "flat from 1 to 16 merges": at most so many times the memory of one merge
QV = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Bar:
    """One thing that must hold: `value` of all runs is at most `limit`; None where it cannot be told."""

    text: str
    limit: float
    value: Callable[[Bench, Runs], float | None]


@dataclass(frozen=True)
class Row:
    """One line of the issue's table: our contender, whom it is compared with, and the bars."""

    ours: str
    against: tuple[str, ...]
    bars: tuple[Bar, ...]
    rounds: int | None = None


def ratio(ours: str, other: str, times: float = 1.0) -> Callable[[Bench, Runs], float | None]:
    """Median over rounds of our wall against `times` the other's."""

    def value(bench: Bench, runs: Runs) -> float | None:
        if ours not in runs or other not in runs:
            return None
        theirs = [wall(other, run) for run in runs[other]]
        theirs = theirs * len(runs[ours]) if len(theirs) == 1 else theirs
        pairs = zip(runs[ours], theirs, strict=False)
        return statistics.median(run.synced_seconds / (times * seconds) for run, seconds in pairs)

    return value


def above_import(ours: str) -> Callable[[Bench, Runs], float | None]:
    """Median over rounds of (our wall - import time) / cp."""

    def value(bench: Bench, runs: Runs) -> float | None:
        if ours not in runs:
            return None
        imports = statistics.median(run.cost.seconds for run in runs["import"])
        pairs = zip(runs[ours], runs["cp"], strict=False)
        return statistics.median((a.synced_seconds - imports) / b.synced_seconds for a, b in pairs)

    return value


def wall(name: str, run: Run) -> float:
    """Until the bytes are on the disk for ours and cp; until the process has ended for peers."""
    return run.cost.seconds if name.startswith(("peft", "mergekit", "import")) else run.synced_seconds


def peak(ours: str, against: str | None = None) -> Callable[[Bench, Runs], float | None]:
    """Highest resident memory of ours, in GB or as a multiple of another's."""

    def value(bench: Bench, runs: Runs) -> float | None:
        if ours not in runs or (against is not None and against not in runs):
            return None
        mine = max(run.cost.peak_bytes["total"] for run in runs[ours])
        if against is None:
            return mine / 1e9
        return mine / max(run.cost.peak_bytes["total"] for run in runs[against])

    return value


def base_reads(ours: str) -> Callable[[Bench, Runs], float | None]:
    """How often the base's bytes were read, as receipts count them."""

    def value(bench: Bench, runs: Runs) -> float | None:
        counted = runs[ours][0].facts.get("base_bytes") if ours in runs else None
        return None if counted is None else float(counted) / bench.base_bytes

    return value


def decoded(ours: str) -> Callable[[Bench, Runs], float | None]:
    """Bytes that ours decoded over the bytes of the tensors that the adapters touch."""

    def value(bench: Bench, runs: Runs) -> float | None:
        counted = runs[ours][0].facts.get("decoded_bytes") if ours in runs else None
        if counted is None:
            return None
        touched = contenders.tensor_bytes(bench.base, lambda name: any(linear in name for linear in QV))
        return float(counted) / touched

    return value


def memory(ours: str) -> Bar:
    """The bar that every row has."""
    return Bar("resident without Ray's daemons, GB", MEMORY_LIMIT_BYTES / 1e9, peak(ours))


def sixteen(ours: str, one: str) -> Row:
    """16 merges in one recipe; `one` is the single merge that needs as much memory as any of them."""
    bars = (
        Bar(f"x ({COPIES} x cp)", 1.3, ratio(ours, "cp", COPIES)),
        Bar(f"x cp of {COPIES} copies, synced once", 1.3, ratio(ours, "cp_16")),
        Bar("times that the base was read", 1.02, base_reads(ours)),
        memory(ours),
        Bar(f"x memory of {one}", FLAT, peak(ours, one)),
    )
    return Row(ours, ("cp", "cp_16", one), bars, rounds=2)


ROWS: Mapping[str, Row] = {
    "task_arithmetic": Row(
        "task_arithmetic",
        ("cp", "peft", "mergekit_task_arithmetic"),
        (
            Bar("x PEFT", 0.5, ratio("task_arithmetic", "peft")),
            Bar("x mergekit", 1 / 15, ratio("task_arithmetic", "mergekit_task_arithmetic")),
            memory("task_arithmetic"),
        ),
    ),
    "task_arithmetic_local": Row(
        "local",
        ("cp", "peft", "import"),
        (Bar("x cp, import time taken off", 2.0, above_import("local")), memory("local")),
    ),
    **{
        name: Row(
            name,
            ("cp", "mergekit_ties"),
            (Bar("x mergekit", 1 / 15, ratio(name, "mergekit_ties")), memory(name)),
        )
        for name in ("ties_tensor", "ties_model")
    },
    **{
        name: Row(
            name,
            ("cp", "task_arithmetic"),
            (Bar("x task_arithmetic", 2.0, ratio(name, "task_arithmetic")), memory(name)),
        )
        for name in ("ties_core", "knots_ties")
    },
    "merges_16": sixteen("merges_16", "task_arithmetic"),
    "merges_16_mixed": sixteen("merges_16_mixed", "ties_tensor"),
    "qv": Row("qv", ("cp",), (Bar("bytes decoded x bytes touched", 1.2, decoded("qv")), memory("qv"))),
}
