"""Trim each delta by magnitude, then sum: magnitude_prune.

Formula: PEFT's merge_utils.magnitude_prune: sum_i weight_i * trim(tau_i). PEFT applies it to dense deltas and
truncates the result by an SVD (`magnitude_prune_svd`), or to B and A apart (`magnitude_prune`), whose product
has cross terms; here it is the first without the SVD. PEFT keeps floor(density * n) entries, here at least one.
"""

from __future__ import annotations

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.catalogue.prune import MagnitudePrune
from ray_merge.methods.catalogue.ties import kept_entries
from ray_merge.methods.context import Context
from ray_merge.methods.dare import weighted_sum
from ray_merge.methods.ties import trimmed


def magnitude_prune(site: SiteFactors, p: MagnitudePrune, context: Context) -> Delta:
    """The weighted sum of trimmed deltas, in the space of choice."""
    space = site.space(p.space)
    thresholds = context.thresholds or [
        (space.threshold(adapter, kept_entries(space.n_entries, share, "paper")),)
        for adapter, share in enumerate(p.density)
    ]
    return space.lift(weighted_sum(trimmed(space, thresholds), p.weight))
