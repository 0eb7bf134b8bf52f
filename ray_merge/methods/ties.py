"""Trim, elect signs, average what agrees: ties and knots_ties.

Formula: TIES-Merging (arXiv 2306.01708). What `compat` changes:

    paper     weights multiply the trimmed deltas before the vote; mean by count; nobody wins a tie
    peft      the vote ignores weights; a tie is won by +
    mergekit  weights before the vote; divided by the weights that agree if `normalize`; a tie is won by +
    authors   the KnOTS code: keeps one entry more (threshold = k-th smallest of n, k = n - floor(density n));
              a tie is won by the sign that wins most often at the site; the weight multiplies the result
"""

from __future__ import annotations

from functools import partial

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spaces import Space
from ray_merge.algebra.sparsify import magnitude_threshold, trim
from ray_merge.methods.context import Context
from ray_merge.methods.election import Kept, election
from ray_merge.methods.parameters import KnotsTies, Ties


def ties(site: SiteFactors, p: Ties, context: Context) -> Delta:
    """TIES in the space of choice."""
    return _ties(site.space(p.space), p, divide=p.compat != "mergekit" or bool(p.normalize))


def knots_ties(site: SiteFactors, p: KnotsTies, context: Context) -> Delta:
    """TIES on S V_i."""
    return _ties(site.space("knots"), p, divide=True)


def kept_entries(n_entries: int, density: float, compat: str) -> int:
    """How many entries survive a trim to `density`."""
    if density >= 1:
        return n_entries
    floor = int(density * n_entries)
    if compat == "authors":
        return floor + 1
    # PEFT keeps nothing where the floor is 0; mergekit stops there with an assertion.
    return floor if compat == "peft" else min(n_entries, max(1, floor))


def trimmed(space: Space, density: tuple[float, ...], compat: str) -> Kept:
    """Each adapter's entries above its own threshold."""
    n_entries = space.n_entries
    thresholds = [
        magnitude_threshold(partial(space.chunks, adapter), n_entries, kept_entries(n_entries, share, compat))
        for adapter, share in enumerate(density)
    ]
    return lambda adapter, index: trim(space.chunk(adapter, index), thresholds[adapter])


def _ties(space: Space, p: Ties | KnotsTies, *, divide: bool) -> Delta:
    kept = trimmed(space, p.density, p.compat)
    return space.lift(election(space, kept, p.weight, p.lambda_, compat=p.compat, divide=divide))
