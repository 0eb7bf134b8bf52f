"""What `diagnostics: true` says of one site, from factors, moments and the base's rows as they go by.

Columns of sites.parquet, null without it. T adapters in the merge's order; entry (i, j) of a list of T * T, row by row,
is the tokens h of task i and adapter j:

    erank_sum, erank_deltas, erank_all   TARA's three effective ranks (algebra/coverage.py), of the factors as given:
                                         each adapter's own terms, added up; the deltas; all terms in one stack
    interference   T * T   root mean square of |s_j B_j A_j h_i| over that of |W h_i|, W without its bias
    activation     T * T   root mean square of |A_j h_i|
    projection     T * T   the same over |A_j|_F times the root mean square of |h_i|: 0 to 1
    anisotropy     T       largest eigenvalue of the inputs' Gram matrix over their sum
    directions     T       its participation ratio, 1 to I

What cannot be known is null: all of a site without moments but the ranks, a task whose tokens never reached the site,
what an adapter of DoRA does (its update is no product of factors), interference where no base weight is read (an
exported adapter alone) or where it gives zero. A W^T W is summed while the rows go by, so that one Gram matrix after
another can be held against it: tr(W G W^T) = <W^T W, G>.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_merge.algebra.coverage import anisotropy, coverage
from ray_merge.algebra.interference import interference, mean_square
from ray_merge.algebra.moments import Moments, MomentSums
from ray_merge.algebra.site import SiteFactors
from ray_merge.recipe import Recipe
from ray_merge.spec import Factor, Figures, Merge, Site
from ray_merge.work.factors import AdapterFiles, Base
from ray_merge.work.moments_file import AnyMoments

PAIRS = ("interference", "activation", "projection")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the tokens of one task show: by figure of `PAIRS` and adapter, and of the inputs themselves."""

    pairs: Mapping[str, Mapping[str, float]]
    anisotropy: float | None
    directions: float | None


class Diagnosis:
    """Looks at one site for all merges that begin from the same base weight.

    Args:
        recipe: whose calibration says whether Gram matrices are sketches.
        site: where.
        merges: those that touch it.
        files: of the adapters, with moments.
        base: gives the base weight where an update depends on it.
    """

    def __init__(
        self, recipe: Recipe, site: Site, merges: Sequence[Merge], files: AdapterFiles, base: Base
    ) -> None:
        self._site, self._files, self._base = site, files, base
        self._sets = tuple(dict.fromkeys(merge.adapters for merge in merges))
        self._names = tuple(dict.fromkeys(name for names in self._sets for name in names))
        self._side = files.statistics.input_side("gram", site)
        sketched = recipe.calibration is not None and recipe.calibration.precision == "sketch"
        # Rows of inputs, and rows that a sketch has to see task by task, are kept until all of them are there.
        self._held: list[Tensor] | None = [] if sketched or self._side == "rows" else None
        self._sums = MomentSums(site.shape[1]) if self._side == "columns" and self._held is None else None
        self._any_rows = False
        self._known: tuple[dict[str, Factor], dict[str, _Seen]] | None = None

    def add(self, W_NI: Tensor) -> None:
        """The next rows of the base weight as it is stored, any floating dtype; of a site without moments unused."""
        if self._held is not None and self._side is not None:
            self._held.append(W_NI)
        elif self._sums is not None:
            self._sums.add(W_NI)
        self._any_rows = True

    def figures(self, adapters: Sequence[str]) -> Figures:
        """The columns for one set of adapters, once all rows were added."""
        if self._known is None:
            self._known = self._look()
        factors, seen = self._known
        own = [factors[name] for name in adapters]
        ranks = None if any(factor.magnitude is not None for factor in own) else coverage(own)
        found: Figures = {
            "erank_sum": None if ranks is None else ranks.separate,
            "erank_deltas": None if ranks is None else ranks.deltas,
            "erank_all": None if ranks is None else ranks.terms,
        }
        if self._side is None:
            return found
        tasks = [seen.get(name) for name in adapters]
        for figure in PAIRS if self._any_rows else PAIRS[1:]:
            found[figure] = [
                None if one is None else one.pairs[figure].get(name) for one in tasks for name in adapters
            ]
        found["anisotropy"] = [None if one is None else one.anisotropy for one in tasks]
        found["directions"] = [None if one is None else one.directions for one in tasks]
        return found

    def _look(self) -> tuple[dict[str, Factor], dict[str, _Seen]]:
        """Factors of every adapter with the inputs in the columns of A, and what each task shows, one after another."""
        given = self._files.site(self._names, self._site, self._base)
        factors = dict(zip(self._names, _on_cpu(given, self._side), strict=True))
        if self._side is None:
            return factors, {}
        weight = _Weight(self._held, self._sums, self._side) if self._any_rows else None
        seen = {}
        for task in self._names:
            moments = self._files.statistics.gram(task, self._site)
            if moments.count:
                seen[task] = self._at(task, moments, factors, weight)
        return factors, seen

    def _at(
        self, task: str, moments: AnyMoments, factors: Mapping[str, Factor], weight: _Weight | None
    ) -> _Seen:
        together = dict.fromkeys(name for names in self._sets if task in names for name in names)
        others = [name for name in together if factors[name].magnitude is None]
        length = _trace(moments) / moments.count
        pairs: dict[str, dict[str, float]] = {figure: {} for figure in PAIRS}
        if others:
            found = interference([factors[name] for name in others], [moments])
            base = None if weight is None else weight.output(moments)
            for name, update, activation in zip(
                others, found.updates[0].tolist(), found.activations[0].tolist(), strict=True
            ):
                pairs["activation"][name] = activation
                # An adapter of rank 0 here reads nothing.
                most = float(factors[name].A.double().norm()) * math.sqrt(length)
                pairs["projection"][name] = activation / most if most else 0.0
                if base and math.isfinite(update / base):
                    pairs["interference"][name] = update / base
        if not length:
            return _Seen(pairs, None, None)
        spread = anisotropy(moments)
        return _Seen(pairs, spread.top_share, spread.directions)


class _Weight:
    """The base weight of a site: W^T W, or its rows where those are needed.

    Args:
        held: its rows as stored, or None.
        sums: those of W^T W where the rows were not held.
        side: which side of the stored weight the inputs are.
    """

    def __init__(self, held: Sequence[Tensor] | None, sums: MomentSums | None, side: str) -> None:
        self._pieces: list[Tensor] = []
        if held is not None:
            self._pieces = [torch.cat(list(held)).T] if side == "rows" else list(held)
        self._sums = sums
        self._square_II: Tensor | None = None

    def output(self, moments: AnyMoments) -> float:
        """Root of the mean over the tokens of |W h|^2."""
        if isinstance(moments, Moments):
            inner = torch.dot(self._square().flatten(), moments.gram.flatten())
            return math.sqrt(max(float(inner), 0.0) / moments.count)
        return math.sqrt(sum(mean_square(W_KI, moments) for W_KI in self._pieces))

    def _square(self) -> Tensor:
        if self._square_II is None:
            sums = self._sums
            if sums is None:
                sums = MomentSums(self._pieces[0].shape[1])
                for W_KI in self._pieces:
                    sums.add(W_KI)
            self._square_II = sums.finish().gram
        return self._square_II


def _on_cpu(given: SiteFactors, side: str | None) -> list[Factor]:
    """Where moments are; of a weight that is stored (in, out), the transposed update s A^T B^T."""
    factors = []
    parts = zip(given.B, given.A, given.scales, given.magnitudes, strict=True)
    for B_OR, A_RI, scale, magnitude in parts:
        B, A = (A_RI.T, B_OR.T) if side == "rows" else (B_OR, A_RI)
        factors.append(Factor(B.cpu(), A.cpu(), scale, magnitude))
    return factors


def _trace(moments: AnyMoments) -> float:
    """Sum over the tokens of |h|^2; of a sketch, the middle of what its bound allows."""
    if isinstance(moments, Moments):
        return float(moments.gram.diagonal().sum())
    return float(moments.sketch.square().sum()) + moments.gram_error * moments.n_columns
