"""Average entries by a score of their size and their agreement with the other adapters: pcb.

Formula: PCB-Merging (arXiv 2410.02396), for T adapters and u(x) = (x - min x) / (max x - min x) over all entries:

    score_i = softmax(T u(tau_i^2)) sum_j softmax(u(tau_i tau_j)), the softmax over entries
    kept_i  = score_i where it is among the largest share `density`, else 0
    merged  = lambda sum_i weight_i kept_i tau_i / sum_i kept_i

`compat: authors` is the function in their pcb-merging.py: |tau_i| clamped to its quantiles 0.0001 and 0.9999 for
the sizes and the average; score_i = exp(T u(|tau_i|)^2) tanh(tau_i sum_j tau_j); kept_i = u(max(score_i, the
lowest score kept)). Its tanh is no softmax, and depends on the deltas' scale.

Minima, maxima, means and order statistics are exact and found chunk by chunk, so scores are computed several
times: T^2 exponentials an entry in each pass. They are those of one site, theirs of the whole model. An adapter
whose delta is zero at the site takes no part: its scores would all be equal, or 0 / 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.select import kth_largest_magnitude
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spaces import Space
from ray_merge.algebra.sparsify import magnitude_threshold, trim
from ray_merge.methods.catalogue.pcb import Pcb
from ray_merge.methods.catalogue.ties import kept_entries
from ray_merge.methods.context import Context

CLAMPED = 0.0001
"""Share of magnitudes that the authors clamp at either end."""

Scored = Callable[[int, int], tuple[Tensor, Tensor]]
"""(adapter, chunk) -> the entries that are averaged, and their scores, 0 where dropped."""

Pair = tuple[int, int]
Range = tuple[float, float]


def pcb(site: SiteFactors, p: Pcb, context: Context) -> Delta:
    """The average of the entries of the highest scores, in the space of choice."""
    space = site.space(p.space)
    adapters = [
        adapter for adapter in range(len(site)) if any(bool(chunk.any()) for chunk in space.chunks(adapter))
    ]
    scored = (_authors if p.compat == "authors" else _paper)(space, adapters, p.density)

    def rule(index: int) -> Tensor:
        total = torch.zeros_like(space.chunk(0, index))
        shares = torch.zeros_like(total)
        for adapter in adapters:
            entries, scores = scored(adapter, index)
            total.addcmul_(entries, scores, value=p.weight[adapter])
            shares += scores
        return total.div_(shares.masked_fill_(shares == 0, 1.0))

    return space.lift(rule)


def _paper(space: Space, adapters: Sequence[int], density: Sequence[float]) -> Scored:
    balance = _Balance(space, adapters)
    kept = {adapter: kept_entries(space.n_entries, density[adapter], "paper") for adapter in adapters}
    thresholds = {
        adapter: magnitude_threshold(partial(balance.chunks, adapter), space.n_entries, kept[adapter])
        for adapter in adapters
    }

    def scored(adapter: int, index: int) -> tuple[Tensor, Tensor]:
        return space.chunk(adapter, index), trim(balance.chunk(adapter, index), thresholds[adapter])

    return scored


class _Balance:
    """The paper's scores, times the square of the number of entries; that factor cancels in the average."""

    def __init__(self, space: Space, adapters: Sequence[int]) -> None:
        self._space = space
        self._adapters = adapters
        self._pairs = tuple(combinations_with_replacement(adapters, 2))
        self._ranges: dict[Pair, Range] = {}
        for index in range(space.n_chunks):
            for pair in self._pairs:
                self._ranges[pair] = _wider(self._ranges.get(pair), self._product(pair, index))
        self._means: dict[tuple[Pair, int], float] = {}
        for index in range(space.n_chunks):
            for pair, factor in self._softmaxes():
                part = self._exponential(self._product(pair, index), pair, factor).sum(dtype=torch.float64)
                mean = float(part) / space.n_entries
                self._means[pair, factor] = self._means.get((pair, factor), 0.0) + mean

    def chunk(self, adapter: int, index: int) -> Tensor:
        """Scores of one adapter's entries of one chunk, above 0 unless they underflow."""
        agreement = torch.zeros_like(self._space.chunk(adapter, index))
        for other in self._adapters:
            agreement += self._softmax((min(adapter, other), max(adapter, other)), 1, index)
        return self._softmax((adapter, adapter), len(self._adapters), index).mul_(agreement)

    def chunks(self, adapter: int) -> Iterable[Tensor]:
        """All chunks of one adapter's scores, in order."""
        return (self.chunk(adapter, index) for index in range(self._space.n_chunks))

    def _softmaxes(self) -> list[tuple[Pair, int]]:
        """Of which products, and with which factor, a softmax is taken; with one adapter both are the same."""
        n = len(self._adapters)
        return list(
            dict.fromkeys([(pair, 1) for pair in self._pairs] + [((own, own), n) for own in self._adapters])
        )

    def _softmax(self, pair: Pair, factor: int, index: int) -> Tensor:
        product = self._product(pair, index)
        return self._exponential(product, pair, factor).div_(self._means[pair, factor])

    def _product(self, pair: Pair, index: int) -> Tensor:
        return self._space.chunk(pair[0], index) * self._space.chunk(pair[1], index)

    def _exponential(self, product: Tensor, pair: Pair, factor: int) -> Tensor:
        # At most exp(0): a softmax without its divisor, which cannot overflow however many adapters there are.
        return _unit(product, self._ranges[pair]).sub_(1.0).mul_(factor).exp_()


def _authors(space: Space, adapters: Sequence[int], density: Sequence[float]) -> Scored:
    n = space.n_entries
    clamps = {adapter: _clamps(space, adapter) for adapter in adapters}

    def score(adapter: int, index: int) -> Tensor:
        own = space.chunk(adapter, index)
        total = sum((space.chunk(other, index) for other in adapters), start=torch.zeros_like(own))
        sizes = _unit(own.abs().clamp_(*clamps[adapter]), clamps[adapter]).square_()
        return sizes.sub_(1.0).mul_(len(adapters)).exp_().mul_(total.mul_(own).tanh_())

    def scores(adapter: int) -> Iterable[Tensor]:
        return (score(adapter, index) for index in range(space.n_chunks))

    ranges = {
        adapter: (
            kth_largest(partial(scores, adapter), n, max(1, n - int(n * (1 - density[adapter])))),
            max(float(chunk.max()) for chunk in scores(adapter)),
        )
        for adapter in adapters
    }

    def scored(adapter: int, index: int) -> tuple[Tensor, Tensor]:
        own = space.chunk(adapter, index)
        entries = own.abs().clamp_(*clamps[adapter]).mul_(own.sign())
        lowest = ranges[adapter][0]
        return entries, _unit(score(adapter, index).clamp_min_(lowest), ranges[adapter])

    return scored


def _clamps(space: Space, adapter: int) -> Range:
    n = space.n_entries
    places = int(n * CLAMPED), int(n * (1 - CLAMPED) - 1)
    low, high = (kth_largest_magnitude(partial(space.chunks, adapter), n, n - place) for place in places)
    return low, high


def kth_largest(chunks: Callable[[], Iterable[Tensor]], n_entries: int, k: int) -> float:
    """The k-th largest entry, sign included; 1 is the largest."""
    value = kth_largest_magnitude(lambda: (chunk.clamp_min(0) for chunk in chunks()), n_entries, k)
    if value > 0:
        return value
    # None of the k largest is lost below zero: counted from the other end, it is the largest of the negatives.
    rising = n_entries - k + 1
    return -kth_largest_magnitude(
        lambda: (chunk.neg().clamp_min_(0) for chunk in chunks()), n_entries, rising
    )


def _wider(ends: Range | None, chunk: Tensor) -> Range:
    low, high = (float(end) for end in torch.aminmax(chunk))
    return (low, high) if ends is None else (min(ends[0], low), max(ends[1], high))


def _unit(values: Tensor, ends: Range) -> Tensor:
    """The values brought to [0, 1]; all 1 where they are equal, so that none is preferred."""
    low, high = ends
    return torch.ones_like(values) if high == low else (values - low).div_(high - low)
