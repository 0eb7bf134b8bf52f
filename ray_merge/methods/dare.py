"""Drop at random, rescale, then sum or elect: dare_linear, dare_ties, knots_dare_ties.

Formula: DARE (arXiv 2311.03099): tau~ = m * tau / density, m ~ Bernoulli(density). Nothing is trimmed by
magnitude. `compat: mergekit` rescales so that the L1 norm of each delta is kept, instead of by 1 / density;
the other values change the election as in `ties.py`. No toolkit's random stream is reproduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spaces import Rule, Space
from ray_merge.algebra.sparsify import drop, random_mask
from ray_merge.methods.catalogue.dare import DareLinear, DareTies, KnotsDareTies
from ray_merge.methods.context import Context
from ray_merge.methods.election import Kept, election

Draw = Callable[[int, int, tuple[int, int]], Tensor]
"""(adapter, chunk, shape) -> True where an entry is kept."""

SMALLEST_L1 = 1e-7
"""mergekit leaves a delta unscaled if its L1 norm is below this before or after the drop."""


def dare_linear(site: SiteFactors, p: DareLinear, context: Context) -> Delta:
    """The weighted sum of dropped and rescaled deltas."""
    space = site.space(p.space)
    kept = dropped(space, p.density, p.compat, draw(p.density, context))
    divisor = sum(p.weight) if p.normalize else 1.0
    return space.lift(weighted_sum(kept, [own / divisor for own in p.weight]))


def dare_ties(site: SiteFactors, p: DareTies, context: Context) -> Delta:
    """Sign election among dropped and rescaled deltas, in the space of choice."""
    return _dare_ties(site.space(p.space), p, context, divide=p.compat != "mergekit" or bool(p.normalize))


def knots_dare_ties(site: SiteFactors, p: KnotsDareTies, context: Context) -> Delta:
    """Sign election among dropped and rescaled S V_i."""
    return _dare_ties(site.space("knots"), p, context, divide=True)


def draw(density: Sequence[float], context: Context) -> Draw:
    """Masks that follow from the merge's seed, the site, the adapter's name and the chunk."""

    def mask(adapter: int, index: int, shape: tuple[int, int]) -> Tensor:
        name = context.names[adapter]
        return random_mask(
            shape, density[adapter], seed=context.seed, site=context.site, adapter=name, chunk=index
        )

    return mask


def dropped(space: Space, density: Sequence[float], compat: str, masks: Draw) -> Kept:
    """Each adapter's entries after the drop, rescaled."""

    def kept_raw(adapter: int, index: int) -> tuple[Tensor, Tensor]:
        values = space.chunk(adapter, index)
        return values, masks(adapter, index, (values.shape[0], values.shape[1]))

    scales = [1.0 / share for share in density]
    if compat == "mergekit":
        scales = [
            _l1_ratio(kept_raw(adapter, index) for index in range(space.n_chunks)) if share < 1 else 1.0
            for adapter, share in enumerate(density)
        ]

    def kept(adapter: int, index: int) -> Tensor:
        if density[adapter] >= 1:
            return space.chunk(adapter, index)
        values, mask = kept_raw(adapter, index)
        return drop(values, mask, scales[adapter])

    return kept


def _l1_ratio(chunks: Iterable[tuple[Tensor, Tensor]]) -> float:
    before = after = 0.0
    for values, mask in chunks:
        before += float(values.abs().sum(dtype=torch.float64))
        after += float(drop(values, mask, 1.0).abs().sum(dtype=torch.float64))
    return 1.0 if before < SMALLEST_L1 or after < SMALLEST_L1 else before / after


def weighted_sum(kept: Kept, coefficients: Sequence[float]) -> Rule:
    """The rule that adds up the kept entries of every adapter, each times its coefficient."""

    def rule(index: int) -> Tensor:
        total = kept(0, index) * coefficients[0]
        for adapter, coefficient in enumerate(coefficients[1:], start=1):
            total += kept(adapter, index) * coefficient
        return total

    return rule


def _dare_ties(space: Space, p: DareTies | KnotsDareTies, context: Context, *, divide: bool) -> Delta:
    kept = dropped(space, p.density, p.compat, draw(p.density, context))
    return space.lift(election(space, kept, p.weight, compat=p.compat, divide=divide))
