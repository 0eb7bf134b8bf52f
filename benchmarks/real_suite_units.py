"""Which settings real_suite.py runs, and in which order."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray_merge

LEARNED = ("tara_b", "nsc", "task_arithmetic", "tara_a", "adamerging")
"""What the table is about, with what they are compared to; these come first."""

EQUAL = ("linear", "cat", "svd")
"""Left out: the sum again, or divided by the number of adapters."""

LAMBDAS = (0.2, 0.4, 0.6, 1.0)
ENTROPY_GRID = tuple(
    {"objective": objective, "learning_rate": rate}
    for objective, rates in (("agreement", (1e-2, 3e-2)), ("entropy", (1e-3, 1e-2)))
    for rate in rates
)
GRIDS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "tara_a": ENTROPY_GRID,
    "tara_b": ENTROPY_GRID,
    "adamerging": ENTROPY_GRID,
    "nsc": (
        *({"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)),
        {"learning_rate": 1e-2, "hold_sum": True},
    ),
    "ties": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "knots_ties": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "consensus_ties": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "breadcrumbs_ties": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "dare_ties": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "knots_dare_ties": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "della": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "regmean": tuple({"off_diagonal": value} for value in (0.1, 0.5, 0.9, 1.0)),
    "fisher": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "pcb": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "iso_c": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "iso_cts": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "cart": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "lora_lego": tuple({"lambda": value} for value in (0.6, 1.0, 1.5, 2.0)),
    "robustmerge": tuple({"lambda": value} for value in (1.0, 1.5, 2.0, 3.0)),
}
"""Four settings a method; of the others `LAMBDAS`."""

FIXED: Mapping[str, Mapping[str, Any]] = {"fisher": {"labels": "sampled"}}
"""Written out for every setting: expected labels take a pass for each of 77 classes."""

WITHOUT_ENTROPY = ("tara_a", "tara_b", "adamerging")
RANDOM = ("dare_linear", "dare_ties", "knots_dare_ties", "della", "della_linear", "lora_lego")


@dataclass(frozen=True)
class Unit:
    """One merge, or the single adapters, and what it is scored on.

    Args:
        tasks: merged, in order.
        method: "single" for each adapter alone.
        role: default, trial, chosen, or paper.
        parameters: JSON of those that are not the defaults.
        seed: of the merge.
        splits: that are scored.
    """

    tasks: tuple[str, ...]
    method: str
    role: str
    parameters: str = "{}"
    seed: int = 0
    splits: tuple[str, ...] = ("val", "test")

    @property
    def key(self) -> str:
        """Unique name."""
        return f"{'+'.join(self.tasks)}|{self.method}|{self.role}|{self.parameters}|{self.seed}"


def next_units(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> list[Unit]:
    """Units without a row, the worthiest first; chosen settings appear when the trials of their method are done."""
    done = {row["key"]: row for row in rows}
    return [unit for unit in _units(options, done) if unit.key not in done]


def methods_of(options: argparse.Namespace) -> list[str]:
    """Names, those that the table is about first."""
    named = [one["name"] for one in ray_merge.methods() if one["name"] not in EQUAL]
    ordered = [*LEARNED, *(name for name in named if name not in LEARNED)]
    return [name for name in ordered if not options.methods or name in options.methods]


def task_sets(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """All tasks, then without each of --without."""
    whole = tuple(options.tasks)
    return [whole, *(tuple(name for name in whole if name != left) for left in options.without)]


def _units(options: argparse.Namespace, done: Mapping[str, Mapping[str, Any]]) -> Iterator[Unit]:
    names = methods_of(options)
    learned = [name for name in names if name in GRIDS and name in LEARNED]
    fixed = [name for name in names if name not in learned]
    whole, *others = task_sets(options)
    yield Unit(whole, "single", "default")
    yield from (_default(options, whole, name) for name in names)
    yield from _trials(options, whole, fixed)
    yield from _chosen(options, whole, fixed, done)
    yield from (_default(options, whole, name, seed) for name in learned for seed in options.seeds[1:])
    yield from _trials(options, whole, learned)
    yield from _chosen(options, whole, learned, done)
    for some in others:
        yield from (_default(options, some, name) for name in names)
        yield from _chosen(options, some, names, done)
        yield from (_default(options, some, name, seed) for name in learned for seed in options.seeds[1:])
    random = [name for name in names if name in RANDOM]
    yield from (_default(options, whole, name, seed) for name in random for seed in options.seeds[1:])
    if not options.no_papers:
        yield from (Unit(whole, name, "paper", _json(name, {"preset": "paper"})) for name in learned)


def _default(options: argparse.Namespace, tasks: tuple[str, ...], name: str, seed: int = 0) -> Unit:
    steps = {"steps": options.steps} if options.steps and name in LEARNED and name in GRIDS else {}
    return Unit(tasks, name, "default", _json(name, steps), seed)


def _trials(options: argparse.Namespace, tasks: tuple[str, ...], names: Sequence[str]) -> Iterator[Unit]:
    for name in names:
        for setting in grid(options, name):
            yield Unit(tasks, name, "trial", _json(name, setting), 0, ("val",))


def _chosen(
    options: argparse.Namespace,
    tasks: tuple[str, ...],
    names: Sequence[str],
    done: Mapping[str, Mapping[str, Any]],
) -> Iterator[Unit]:
    """Settings that were best on all tasks' validation rows, on these tasks; a subset has no search of its own."""
    for name in names:
        several = name in (*LEARNED, *RANDOM) and name != "task_arithmetic"
        for parameters in dict.fromkeys(best_settings(options, name, done).values()):
            for seed in options.seeds if several else options.seeds[:1]:
                yield Unit(tasks, name, "chosen", parameters, seed)


def best_settings(
    options: argparse.Namespace, name: str, done: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Criterion ("all", "classification") -> parameters of the best trial; nothing before all trials are done."""
    trials = [done.get(unit.key) for unit in _trials(options, task_sets(options)[0], [name])]
    scored = [row for row in trials if row is not None and "val" in row]
    if not scored or any(row is None for row in trials):
        return {}
    criteria = {
        "all": lambda row: statistics.fmean(row["val"].values()),
        "classification": lambda row: statistics.fmean(
            score for task, score in row["val"].items() if task not in row["regressions"]
        ),
    }
    return {key: max(scored, key=mean)["parameters"] for key, mean in criteria.items()}


def grid(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """The four settings of a method."""
    found = [dict(one) for one in GRIDS.get(name, [{"lambda": value} for value in LAMBDAS])]
    if name in LEARNED and name in GRIDS:
        found = [{**one, "steps": options.trial_steps} for one in found]
    return found


def _json(name: str, parameters: Mapping[str, Any]) -> str:
    return json.dumps({**FIXED.get(name, {}), **parameters}, sort_keys=True)
