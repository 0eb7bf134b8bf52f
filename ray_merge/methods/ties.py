"""Trim, elect signs, average what agrees: ties and knots_ties.

Formula: TIES-Merging (arXiv 2306.01708). What `compat` changes:

    paper     weights multiply the trimmed deltas before the vote; mean by count; nobody wins a tie
    peft      the vote ignores weights; a tie is won by +
    mergekit  weights before the vote; divided by the weights that agree if `normalize`; a tie is won by +
    authors   the KnOTS code: keeps one entry more (threshold = k-th smallest of n, k = n - floor(density n));
              a tie is won by the sign that wins most often at the site; the weight multiplies the result
"""

from __future__ import annotations

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spaces import Space
from ray_merge.algebra.sparsify import trim
from ray_merge.methods.catalogue.ties import KnotsTies, Ties, kept_entries
from ray_merge.methods.context import Context, Thresholds
from ray_merge.methods.election import Kept, election


def ties(site: SiteFactors, p: Ties, context: Context) -> Delta:
    """TIES in the space of choice."""
    return _ties(site.space(p.space), p, context, divide=p.compat != "mergekit" or bool(p.normalize))


def knots_ties(site: SiteFactors, p: KnotsTies, context: Context) -> Delta:
    """TIES on S V_i."""
    return _ties(site.space("knots"), p, context, divide=True)


def trimmed(space: Space, thresholds: Thresholds) -> Kept:
    """Each adapter's entries at or above its first threshold."""
    return lambda adapter, index: trim(space.chunk(adapter, index), thresholds[adapter][0])


def _ties(space: Space, p: Ties | KnotsTies, context: Context, *, divide: bool) -> Delta:
    kept = trimmed(space, thresholds(space, p, context))
    return space.lift(election(space, kept, p.weight, compat=p.compat, divide=divide))


def thresholds(space: Space, p: Ties | KnotsTies, context: Context) -> Thresholds:
    """Where each adapter's kept entries end, here or over the whole model."""
    n = space.n_entries
    return context.thresholds or [
        (space.threshold(adapter, kept_entries(n, share, p.compat)),)
        for adapter, share in enumerate(p.density)
    ]
