"""Drop at random by rank of magnitude, rescale, then sum or elect: della, della_linear.

Formula: DELLA (arXiv 2406.11617), MAGPRUNE: within a row of I entries, the one of rank r = 0 .. I - 1 by ascending
magnitude is kept with probability p = density - epsilon + 2 epsilon r / (I - 1) and divided by p; as in the
authors' code (the paper counts ranks from 1 and divides by I). `compat: mergekit` rescales so that the L1 norm of
each delta is kept; otherwise it changes the election as in `ties.py`. No toolkit's random stream is reproduced:
with epsilon 0 the masks are those of DARE.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spaces import Space
from ray_merge.algebra.sparsify import mask_seed
from ray_merge.methods.catalogue.della import Della, DellaLinear
from ray_merge.methods.context import Context
from ray_merge.methods.dare import dropped, weighted_sum
from ray_merge.methods.election import Kept, election

Uniform = Callable[[int, int, tuple[int, int]], Tensor]
"""(adapter, chunk, shape) -> float32 numbers in [0, 1)."""


def della(site: SiteFactors, p: Della, context: Context) -> Delta:
    """Sign election among sampled and rescaled deltas, in the space of choice."""
    space = site.space(p.space)
    divide = p.compat != "mergekit" or bool(p.normalize)
    kept = sampled(space, p, uniform(context))
    return space.lift(election(space, kept, p.weight, compat=p.compat, divide=divide))


def della_linear(site: SiteFactors, p: DellaLinear, context: Context) -> Delta:
    """The weighted sum of sampled and rescaled deltas."""
    space = site.space(p.space)
    divisor = sum(p.weight) if p.normalize else 1.0
    kept = sampled(space, p, uniform(context))
    return space.lift(weighted_sum(kept, [own / divisor for own in p.weight]))


def probabilities(values_CI: Tensor, density: float, epsilon: float) -> Tensor:
    """(C, I) in the dtype of the values: with what probability each entry is kept, by its rank in its row.

    Entries of equal magnitude are ranked by column. A row of one entry has nothing to rank: `density`.
    """
    n_columns = values_CI.shape[1]
    if n_columns == 1 or epsilon == 0:
        return torch.full_like(values_CI, density)
    rising_I = torch.arange(n_columns, dtype=torch.float64, device=values_CI.device) / (n_columns - 1)
    by_rank_I = (density - epsilon + 2 * epsilon * rising_I).to(values_CI.dtype)
    order_CI = values_CI.abs().argsort(dim=1, stable=True)
    return torch.empty_like(values_CI).scatter_(1, order_CI, by_rank_I.expand_as(values_CI))


def uniform(context: Context) -> Uniform:
    """Numbers that follow from the merge's seed, the site, the adapter's name and the chunk; drawn on the CPU."""

    def numbers(adapter: int, index: int, shape: tuple[int, int]) -> Tensor:
        seed = mask_seed(context.seed, context.site, context.names[adapter], index)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)

    return numbers


def sampled(space: Space, p: Della | DellaLinear, numbers: Uniform) -> Kept:
    """Each adapter's entries whose number is below their probability, rescaled."""

    def mask_of(adapter: int, index: int, p_CI: Tensor) -> Tensor:
        drawn_CI = numbers(adapter, index, (p_CI.shape[0], p_CI.shape[1]))
        return drawn_CI.to(p_CI.device) < p_CI.float()

    def probability(adapter: int, index: int) -> Tensor:
        return probabilities(space.chunk(adapter, index), p.density[adapter], p.epsilon[adapter])

    if p.compat == "mergekit":
        return dropped(
            space,
            p.density,
            "mergekit",
            lambda adapter, index, _: mask_of(adapter, index, probability(adapter, index)),
        )

    def kept(adapter: int, index: int) -> Tensor:
        if p.density[adapter] >= 1:
            return space.chunk(adapter, index)
        p_CI = probability(adapter, index)
        return (space.chunk(adapter, index) / p_CI).mul_(mask_of(adapter, index, p_CI))

    return kept
