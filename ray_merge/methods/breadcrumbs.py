"""Drop the largest and the smallest entries, then sum or elect: breadcrumbs, breadcrumbs_ties.

Formula: Model Breadcrumbs (arXiv 2312.06795): of each layer's delta only the entries between two quantiles of
magnitude are left. What `compat` changes:

    paper     the quantiles are those of the whole weight, or of the model
    authors   breadcrumbs only: their code takes the quantiles of each row (the last axis)
    mergekit  breadcrumbs_ties only: as for `ties.py`, not normalised by default
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spaces import Space
from ray_merge.algebra.sparsify import trim
from ray_merge.methods.catalogue.breadcrumbs import Breadcrumbs, BreadcrumbsTies, band_counts
from ray_merge.methods.context import Context
from ray_merge.methods.dare import weighted_sum
from ray_merge.methods.election import Kept, election


def breadcrumbs(site: SiteFactors, p: Breadcrumbs, context: Context) -> Delta:
    """The weighted sum of what is left of each delta."""
    space = site.space(p.space)
    kept = _row_bands(space, p) if p.compat == "authors" else _bands(space, p, context)
    divisor = sum(p.weight) if p.normalize else 1.0
    return space.lift(weighted_sum(kept, [own / divisor for own in p.weight]))


def breadcrumbs_ties(site: SiteFactors, p: BreadcrumbsTies, context: Context) -> Delta:
    """Sign election among what is left of each delta."""
    space = site.space(p.space)
    divide = p.compat != "mergekit" or bool(p.normalize)
    kept = _bands(space, p, context)
    return space.lift(election(space, kept, p.weight, compat=p.compat, divide=divide))


def band(values: Tensor, low: float, high: float) -> Tensor:
    """Entries of magnitude from `low` to `high`, the others zero; equal magnitudes share one fate."""
    return trim(values, low).sub_(torch.nn.functional.hardshrink(values, high))


def row_band(values_CI: Tensor, density: float, gamma: float) -> Tensor:
    """In each row, entries below the int(gamma I) largest magnitudes, int(density I) of them; the others zero."""
    n_columns = values_CI.shape[1]
    above, kept = int(gamma * n_columns), int(density * n_columns)
    if not kept or above >= n_columns:
        return torch.zeros_like(values_CI)
    magnitudes_CI = values_CI.abs()
    largest_CK = magnitudes_CI.topk(min(n_columns, above + kept), dim=1).values
    low_C1, high_C1 = largest_CK[:, -1:], largest_CK[:, above : above + 1]
    outside = (magnitudes_CI < low_C1) | (magnitudes_CI > high_C1)
    return values_CI.masked_fill(outside, 0.0)


def _bands(space: Space, p: Breadcrumbs | BreadcrumbsTies, context: Context) -> Kept:
    thresholds = context.thresholds or [
        tuple(space.threshold(adapter, count) for count in band_counts(space.n_entries, share, gamma))
        for adapter, (share, gamma) in enumerate(zip(p.density, p.gamma, strict=True))
    ]
    return lambda adapter, index: band(space.chunk(adapter, index), *thresholds[adapter])


def _row_bands(space: Space, p: Breadcrumbs) -> Kept:
    return lambda adapter, index: row_band(space.chunk(adapter, index), p.density[adapter], p.gamma[adapter])
