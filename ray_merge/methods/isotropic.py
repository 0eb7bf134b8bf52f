"""Merging to a flat spectrum: iso_c and iso_cts.

Formulas: No Task Left Behind (arXiv 2502.04959), equations for Iso-C and Iso-CTS.

    iso_c    sum_i weight_i * delta_i = U S V^T  ->  lambda * mean(S) * U V^T
    iso_cts  the top directions of that sum and, per adapter, the top directions of what the sum's left vectors do not
             reach; both sides replaced by their polar factors, every singular value by the mean of all

The papers' code counts all min(O, I) singular values. Most of them are zero where deltas are low rank: the mean
shrinks with the shape of the weight, and the flat spectrum is given to the null space too, in whatever basis LAPACK
returns. `spectrum: rank` counts the directions that exist; `spectrum: full` has the published mean and the published
share of common directions. The null space stays empty in both.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray_merge.algebra.delta import LowRankDelta, product_norm
from ray_merge.algebra.diagnose import ThinSvd, spectral_norm
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spectrum import (
    added,
    beside,
    directions,
    directions_outside,
    lift_product,
    n_directions,
    polar,
    precision_of,
    span_rank,
    weighted_pairs,
)
from ray_merge.methods.catalogue.isotropic import IsoC, IsoCts, task_directions
from ray_merge.methods.context import Context


def iso_c(site: SiteFactors, p: IsoC, context: Context) -> LowRankDelta:
    """The weighted sum with every singular value replaced by their mean."""
    pairs = weighted_pairs(site, p.weight)
    largest = max(product_norm(*pair) for pair in pairs)
    total = directions(added(pairs), precision_of(site), largest=largest)
    n_all = len(total.S_K) if p.spectrum == "rank" else n_directions(site, p.space)
    level = float(total.S_K.sum()) / max(1, n_all)
    return lift_product(site.core, total.U_OK * level, total.V_IK.T, site.dtype)


def iso_cts(site: SiteFactors, p: IsoCts, context: Context) -> LowRankDelta:
    """A flat spectrum over the sum's top directions and each adapter's own directions outside of them.

    Adapters without a delta here (rank 0, B = 0, weight 0) are not among the T that share directions.
    """
    precision = precision_of(site)
    pairs = weighted_pairs(site, p.weight)
    whole = [directions(pair, precision) for pair in pairs]
    touching = [index for index, task in enumerate(whole) if len(task.S_K)]
    n_all = _spanned(whole, precision) if p.spectrum == "rank" else n_directions(site, p.space)
    n_task = task_directions(n_all, p.common, len(touching))
    largest = max(spectral_norm(task.S_K) for task in whole)
    n_common = n_all - n_task * len(touching)
    common = directions(added(pairs), precision, largest=largest, most=n_common)
    own = [
        directions_outside(
            pairs[index], common.U_OK, precision, whole=spectral_norm(whole[index].S_K), most=n_task
        )
        for index in touching
    ]
    U_PK, s_K, V_QK = beside([common, *own])
    level = float(s_K.sum()) / max(1, len(s_K) if p.spectrum == "rank" else n_all)
    return lift_product(site.core, polar(U_PK, precision) * level, polar(V_QK, precision).T, site.dtype)


def _spanned(tasks: Sequence[ThinSvd], precision: float) -> int:
    """The most directions that deltas with these vectors can have together."""
    U_PK, _, V_QK = beside(tasks)
    return min(span_rank(U_PK, precision), span_rank(V_QK, precision))
