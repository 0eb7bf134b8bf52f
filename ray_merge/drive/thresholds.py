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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_merge.algebra.radix import MAGNITUDE_BITS, Histogram, Prefix, narrow
from ray_merge.drive.events import Event
from ray_merge.errors import OutputConflict
from ray_merge.methods.context import Thresholds
from ray_merge.methods.registry import get, selects_over_model
from ray_merge.plan import QUESTIONS_AT_ONCE, Plan
from ray_merge.pool import Pool, Task
from ray_merge.spec import Merge, needs_base
from ray_merge.storage.commit import pretty_json
from ray_merge.storage.store import Store
from ray_merge.work.job import Question, SelectUnit, Series

THRESHOLDS = "ray_merge/thresholds.json"

GATHERED = 2**16  # as many bytes as a histogram (plan.memory.QUESTION_BYTES)
"""Candidates that are fetched at most, 512 KiB, in place of one more round."""


@dataclass(slots=True)
class _Search:
    """One place of one series: the k-th largest magnitude."""

    series: Series
    prefix: Prefix
    k: int
    n_candidates: int = 0
    found: float | None = None

    def take(self, histogram: Histogram) -> None:
        """Go on to the digit that the k-th largest candidate has."""
        self.prefix, self.k, self.n_candidates = narrow(self.prefix, self.k, histogram)
        if self.prefix.complete:
            self.found = self.prefix.magnitude

    @property
    def question(self) -> Question:
        """What to ask next."""
        gather = self.n_candidates if self.n_candidates <= GATHERED else 0
        return Question(self.series, self.prefix, gather)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What all shards together say to one question; `magnitudes` ascending."""

    histogram: Histogram
    magnitudes: NDArray[np.float64]
    n_entries: int


def select_thresholds(
    plan: Plan, merges: Sequence[Merge], pool: Pool, progress: Callable[[Event], None]
) -> dict[str, Thresholds]:
    """The thresholds of each merge: per adapter the magnitudes of its `Method.counts` largest entries.

    Args:
        plan: of the run.
        merges: those that select over the whole model.
        pool: of the run's workers.
        progress: called once before the first round, and with each shard that was counted.
    """
    if not merges:
        return {}
    progress(Event(kind="select", text=f"selecting over the whole model for {len(merges)} merge(s)"))
    rounds = _Rounds(plan, merges, pool, progress)
    series = {merge.name: _series(plan, merge, merges) for merge in merges}
    each = dict.fromkeys(one for some in series.values() for one in some)
    starts = {one: Prefix(total_bits=_bits(plan, one)) for one in each}
    first = {q.series: answer for q, answer in rounds.ask([Question(*start) for start in starts.items()])}
    places = {merge.name: _places(plan, merge, series[merge.name], first) for merge in merges}
    searches: dict[tuple[Series, int], _Search] = {}
    for merge in merges:
        for one, (some, n_entries) in zip(series[merge.name], places[merge.name], strict=True):
            for k in some:
                searches.setdefault((one, k), _begin(one, starts[one], k, n_entries, first[one].histogram))
    while open_ones := [search for search in searches.values() if search.found is None]:
        _round(open_ones, rounds)
    return {
        merge.name: tuple(
            tuple(searches[one, k].found or 0.0 for k in some)
            for one, (some, _) in zip(series[merge.name], places[merge.name], strict=True)
        )
        for merge in merges
    }


class _Rounds:
    """Asks all shards that hold a site of the merges."""

    def __init__(
        self, plan: Plan, merges: Sequence[Merge], pool: Pool, progress: Callable[[Event], None]
    ) -> None:
        tensors = {site.tensor for merge in merges for site in plan.touched(merge)}
        self._shards = [s.index for s in plan.shards if any(tensor.name in tensors for tensor in s.tensors)]
        self._pool = pool
        self._progress = progress
        self._count = 0

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, _Answer]]:
        """The answers of all shards, added up; so many questions at once that a worker holds them all."""
        ordered = sorted(questions, key=lambda q: (q.series.merge, q.series.space, q.series.adapters))
        for start in range(0, len(ordered), QUESTIONS_AT_ONCE):
            yield from self._batch(ordered[start : start + QUESTIONS_AT_ONCE])

    def _batch(self, questions: Sequence[Question]) -> list[tuple[Question, _Answer]]:
        units = [SelectUnit(shard, tuple(questions), self._count) for shard in self._shards]
        self._count += 1
        counts = [np.zeros(0 if q.gather else 1 << q.prefix.width, np.int64) for q in questions]
        magnitudes: list[list[NDArray[np.float64]]] = [[] for _ in questions]
        n_entries = [0] * len(questions)
        for counted, done in enumerate(self._pool.run([Task(unit.id, unit) for unit in units]), start=1):
            self._progress(
                Event(kind="select", text=f"selecting, round {self._count}", units=(counted, len(units)))
            )
            for index, found in enumerate(done.value):
                n_entries[index] += found.n_entries
                counts[index][found.histogram.digits] += found.histogram.counts
                magnitudes[index].append(found.magnitudes)
        return [
            (question, _Answer(Histogram.of(own), np.sort(np.concatenate([*some, np.zeros(0)])), n))
            for question, own, some, n in zip(questions, counts, magnitudes, n_entries, strict=True)
        ]


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
    plan: Plan, merge: Merge, series: Sequence[Series], first: Mapping[Series, _Answer]
) -> list[tuple[tuple[int, ...], int]]:
    """Per adapter the k of its thresholds, and the entries they are places among.

    These include the zeros of sites that the adapter does not touch.
    """
    counts = get(merge.method).counts
    assert counts is not None
    in_all = sum(math.prod(site.shape) for site in plan.touched(merge))
    n_entries = [in_all if one.space == "dense" else first[one].n_entries for one in series]
    return [(counts(merge.parameters, one.adapter, n), n) for one, n in zip(series, n_entries, strict=True)]


def _begin(series: Series, prefix: Prefix, k: int, n_entries: int, histogram: Histogram) -> _Search:
    search = _Search(series, prefix, k)
    if k == 0:
        search.found = math.inf
    elif k >= n_entries or k > histogram.total:
        # Everything is kept, or the k-th largest is a zero of a site that the adapter does not touch.
        search.found = 0.0
    else:
        search.take(histogram)
    return search


def _round(searches: Sequence[_Search], rounds: _Rounds) -> None:
    by_question: dict[Question, list[_Search]] = defaultdict(list)
    for search in searches:
        by_question[search.question].append(search)
    for question, answer in rounds.ask(list(by_question)):
        for search in by_question[question]:
            if question.gather:
                search.found = float(answer.magnitudes[len(answer.magnitudes) - search.k])
            else:
                search.take(answer.histogram)


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
        return tuple(_values(merge, name, document[name]) for name in merge.adapters)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise OutputConflict(
            f"{store.url}/{THRESHOLDS} is damaged ({error}); remove this merge's folder"
        ) from error


def _values(merge: Merge, adapter: str, given: Any) -> tuple[float, ...]:
    counts = get(merge.method).counts
    assert counts is not None
    n_values = len(counts(merge.parameters, adapter, 1))
    if not isinstance(given, list) or len(given) != n_values:
        raise ValueError(f"{adapter} is {given!r}, expected a list of {n_values}")
    if not all(value is None or (isinstance(value, float) and 0 <= value < math.inf) for value in given):
        raise ValueError(f"{adapter} is {given!r}, expected magnitudes")
    return tuple(math.inf if value is None else value for value in given)
