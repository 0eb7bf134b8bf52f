"""One select unit: how often each magnitude occurs among the entries at one shard's sites. Writes nothing.

Adapters and bases are read site by site and entries made chunk by chunk, as for a merge; what leaves the worker are
histograms, of a few kilobytes each, or at most `GATHERED` magnitudes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_merge.algebra.radix import Histogram
from ray_merge.algebra.select import count, gather, launches, magnitude_bits
from ray_merge.algebra.site import SiteFactors
from ray_merge.plan import Plan
from ray_merge.pool import Turn
from ray_merge.spec import Merge, Site
from ray_merge.storage.store import Stores
from ray_merge.storage.stream import Reader
from ray_merge.work.factors import AdapterFiles, Base
from ray_merge.work.job import Job, Question, SelectUnit, Series
from ray_merge.work.sources import Sources, open_base


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to one question from one shard.

    Args:
        histogram: of the candidates; empty for a question that gathers.
        magnitudes: of the candidates, for a question that gathers.
        n_entries: entries looked at, candidates or not.
    """

    histogram: Histogram
    magnitudes: NDArray[np.float64]
    n_entries: int


def run_select(job: Job, unit: SelectUnit, files: AdapterFiles, stores: Stores, turn: Turn) -> list[Found]:
    """The answers to the unit's questions, in order; `Prefix.total_bits` of round 0 is set by the entries' dtype."""
    plan = job.plan
    merges = {merge.name: merge for merge in plan.merges}
    tallies = [_Tally(question) for question in unit.questions]
    by_series: dict[Series, list[_Tally]] = defaultdict(list)
    for tally in tallies:
        by_series[tally.question.series].append(tally)
    by_merge: dict[str, dict[tuple[str, tuple[str, ...]], list[Series]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for series in by_series:
        by_merge[series.merge][series.space, series.adapters].append(series)
    with ExitStack() as stack:
        reader = stack.enter_context(Reader(open_base(stores, plan.base)))
        sources = Sources(plan.base, reader, files)
        for name, spaces in by_merge.items():
            for site, base in _sites(plan, merges[name], unit.shard, sources):
                for (space, adapters), wanted in spaces.items():
                    _look(files.site(adapters, site, base), space, [(s, by_series[s]) for s in wanted], turn)
    return [tally.found() for tally in tallies]


def _sites(plan: Plan, merge: Merge, shard: int, sources: Sources) -> Iterator[tuple[Site, Base]]:
    """The sites of `merge` in one shard, each with its base weight on demand."""
    tensors = {tensor.name: tensor for tensor in plan.tensors(merge, plan.shards[shard])}
    for site in plan.touched(merge):
        if site.tensor in tensors:
            yield site, _base(sources, tensors, site)


def _base(sources: Sources, tensors: Mapping[str, object], site: Site) -> Base:
    whole = (site.start, site.start + site.shape[0])
    return lambda: sources.matrix(tensors[site.tensor], whole, site.shape[1])  # type: ignore[arg-type]


def _look(
    factors: SiteFactors, space: str, wanted: Sequence[tuple[Series, Sequence[_Tally]]], turn: Turn
) -> None:
    coordinates = factors.space(space)
    for series, tallies in wanted:
        index = series.adapters.index(series.adapter)
        if factors.ranks[index] == 0 and space == "dense":
            continue  # all zeros: the driver knows how many there are
        for chunk in launches(coordinates.chunks(index)):
            turn.check()
            for tally in tallies:
                tally.add(chunk)


class _Tally:
    """Adds up the answer to one question, in memory that is taken once.

    What is gathered goes into one array: a small tensor for each chunk, kept between large ones that come and go,
    would pin the heap (23 GB were measured where this takes 0.4).
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        prefix = question.prefix
        self._counts = torch.zeros(0 if question.gather else 1 << prefix.width, dtype=torch.int64)
        self._magnitudes = np.empty(question.gather)
        self._n_gathered = 0
        self._n_entries = 0

    def add(self, chunk: Tensor) -> None:
        self._n_entries += chunk.numel()
        prefix = self.question.prefix
        assert prefix.total_bits == magnitude_bits(chunk.dtype), (
            "the driver and the entries disagree on the dtype"
        )
        if not self.question.gather:
            self._counts = self._counts.to(
                chunk.device
            )  # once: small transfers took most of the time on a GPU
            self._counts += count(chunk, prefix)
            return
        found = gather(chunk, prefix).cpu().numpy()
        self._magnitudes[self._n_gathered : self._n_gathered + len(found)] = found
        self._n_gathered += len(found)

    def found(self) -> Found:
        return Found(
            Histogram.of(self._counts.cpu().numpy()),
            self._magnitudes[: self._n_gathered].copy(),
            self._n_entries,
        )
