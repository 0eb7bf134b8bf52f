"""`scope: model`: which magnitudes the kept entries of each adapter end at, selected over all sites of a merge.

Owns: the rounds of counting. Workers count the entries at the sites of one shard by the bits of their magnitudes
(work/order_statistics.py); the driver adds the histograms up, takes the next bits (algebra/radix.py) and asks again:
two rounds for float32, three or four for the float64 entries of core and knots. No entries are gathered, but for the
last few candidates. What was found is committed beside the recipe, so that a run that is killed does not count again.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_merge.algebra.radix import MAGNITUDE_BITS, Counts, Prefix, narrow
from ray_merge.errors import OutputConflict
from ray_merge.methods.context import Thresholds
from ray_merge.methods.registry import get, selects_over_model
from ray_merge.plan import Plan
from ray_merge.pool import Pool, Task
from ray_merge.spec import Merge, needs_base
from ray_merge.storage.commit import pretty_json
from ray_merge.storage.store import Store
from ray_merge.work.job import Question, SelectUnit, Series

THRESHOLDS = "ray_merge/thresholds.json"

GATHERED = 2**16
"""Candidates that are fetched at most, 512 KiB, in place of one more round."""


@dataclass(slots=True)
class _Search:
    """One place of one series: the k-th largest magnitude."""

    series: Series
    prefix: Prefix
    k: int
    n_candidates: int
    found: float | None = None


@dataclass(slots=True)
class _Answer:
    """What all shards together say to one question."""

    counts: Counts
    magnitudes: list[Any] = field(default_factory=list)
    n_entries: int = 0


def select_thresholds(plan: Plan, merges: Sequence[Merge], pool: Pool) -> dict[str, Thresholds]:
    """The thresholds of each merge: per adapter the magnitudes of its `Method.counts` largest entries.

    Args:
        plan: of the run.
        merges: those that select over the whole model.
        pool: of the run's workers.
    """
    if not merges:
        return {}
    rounds = _Rounds(plan, merges, pool)
    series = {merge.name: _series(plan, merge, merges) for merge in merges}
    starts = {
        one: Question(one, Prefix(total_bits=_bits(plan, one))) for some in series.values() for one in some
    }
    first = rounds.ask(list(dict.fromkeys(starts.values())))
    searches: dict[tuple[Series, int], _Search] = {}
    for merge in merges:
        for one, places in zip(
            series[merge.name], _places(plan, merge, series[merge.name], first), strict=True
        ):
            for k in places:
                searches.setdefault((one, k), _begin(one, k, first[starts[one]], starts[one].prefix))
    while open_ones := [search for search in searches.values() if search.found is None]:
        _round(open_ones, rounds)
    return {
        merge.name: tuple(
            tuple(searches[one, k].found or 0.0 for k in places)
            for one, places in zip(
                series[merge.name], _places(plan, merge, series[merge.name], first), strict=True
            )
        )
        for merge in merges
    }


class _Rounds:
    """Asks all shards that hold a site of the merges."""

    def __init__(self, plan: Plan, merges: Sequence[Merge], pool: Pool) -> None:
        tensors = {site.tensor for merge in merges for site in plan.touched(merge)}
        self._shards = [s.index for s in plan.shards if any(tensor.name in tensors for tensor in s.tensors)]
        self._pool = pool
        self._count = 0

    def ask(self, questions: Sequence[Question]) -> dict[Question, _Answer]:
        """The answers of all shards, added up in the order of shards."""
        units = [SelectUnit(shard, tuple(questions), self._count) for shard in self._shards]
        self._count += 1
        parts = {done.id: done.value for done in self._pool.run([Task(unit.id, unit) for unit in units])}
        answers = {q: _Answer(np.zeros(1 << q.prefix.width, np.int64)) for q in questions}
        for unit in units:
            for question, found in zip(questions, parts[unit.id], strict=True):
                answer = answers[question]
                answer.n_entries += found.n_entries
                if question.gather:
                    answer.magnitudes.append(found.values)
                else:
                    answer.counts[found.values] += found.counts
        return answers


def _series(plan: Plan, merge: Merge, merges: Sequence[Merge]) -> list[Series]:
    space = merge.parameters.get("space", get(merge.method).spaces[0])
    if space != "dense":
        owner = next(m.name for m in merges if m.adapters == merge.adapters)
        return [Series(owner, space, merge.adapters, name) for name in merge.adapters]
    return [Series(_owner(plan, merge, merges, name), "dense", (name,), name) for name in merge.adapters]


def _owner(plan: Plan, merge: Merge, merges: Sequence[Merge], adapter: str) -> str:
    """The merge whose base tensors a dense series is counted on: any, unless the update depends on them."""
    if any(map(needs_base, plan.adapters[adapter].factors.values())):
        return merge.name
    return next(m.name for m in merges if adapter in m.adapters)


def _bits(plan: Plan, series: Series) -> int:
    return MAGNITUDE_BITS[plan.recipe.dtype if series.space == "dense" else "float64"]


def _places(
    plan: Plan, merge: Merge, series: Sequence[Series], first: Mapping[Question, _Answer]
) -> list[tuple[int, ...]]:
    """Per adapter the k of its thresholds; k counts the zeros of sites that the adapter does not touch."""
    counts = get(merge.method).counts
    assert counts is not None
    in_all = sum(math.prod(site.shape) for site in plan.touched(merge))
    n_entries = {question.series: answer.n_entries for question, answer in first.items()}
    return [
        counts(merge.parameters, one.adapter, in_all if one.space == "dense" else n_entries[one])
        for one in series
    ]


def _begin(series: Series, k: int, answer: _Answer, prefix: Prefix) -> _Search:
    counted = int(answer.counts.sum())
    if k == 0:
        return _Search(series, prefix, k, 0, found=math.inf)
    if k >= counted:  # everything is kept, or the k-th is a zero of a site that the adapter does not touch
        return _Search(series, prefix, k, 0, found=0.0)
    longer, left, n_candidates = narrow(prefix, k, answer.counts)
    return _Search(series, longer, left, n_candidates)


def _round(searches: Sequence[_Search], rounds: _Rounds) -> None:
    by_question: dict[Question, list[_Search]] = defaultdict(list)
    for search in searches:
        gather = search.n_candidates <= GATHERED
        by_question[Question(search.series, search.prefix, gather)].append(search)
    answers = rounds.ask(list(by_question))
    for question, some in by_question.items():
        for search in some:
            if question.gather:
                together = np.sort(np.concatenate(answers[question].magnitudes))
                search.found = float(together[len(together) - search.k])
                continue
            counts = answers[question].counts
            search.prefix, search.k, search.n_candidates = narrow(search.prefix, search.k, counts)
            if search.prefix.complete:
                search.found = search.prefix.magnitude


def selecting(merges: Sequence[Merge]) -> list[Merge]:
    """Those of `merges` that keep entries by their place in the whole model."""
    return [merge for merge in merges if selects_over_model(get(merge.method), merge.parameters)]


def to_json(merge: Merge, thresholds: Thresholds) -> bytes:
    """The content of thresholds.json; null where an adapter keeps nothing."""
    return pretty_json(
        {
            name: [None if math.isinf(value) else value for value in values]
            for name, values in zip(merge.adapters, thresholds, strict=True)
        }
    )


def read_thresholds(store: Store, merge: Merge) -> Thresholds | None:
    """What an earlier run of the same merge found; None where there is nothing yet.

    Raises:
        OutputConflict: what is there is damaged.
    """
    if store.info(THRESHOLDS) is None:
        return None
    try:
        document = json.loads(store.read(THRESHOLDS))
        return tuple(
            tuple(math.inf if value is None else float(value) for value in document[name])
            for name in merge.adapters
        )
    except (ValueError, TypeError, KeyError) as error:
        raise OutputConflict(
            f"{store.url}/{THRESHOLDS} is damaged ({error}); remove this merge's folder"
        ) from error
