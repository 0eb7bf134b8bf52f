"""Merging by coefficients that were learned: TARA-A, TARA-B, AdaMerging, NSC. How they are learned: ray_merge/learn.

Formulas and their sources: algebra/directions.py.
"""

from __future__ import annotations

from typing import Any

from ray_merge.algebra.delta import LowRankDelta
from ray_merge.algebra.directions import Directions
from ray_merge.algebra.phi_shape import Coefficients
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.context import Context


def tara_a(site: SiteFactors, _: Any, context: Context) -> LowRankDelta:
    """One coefficient per rank-1 direction of each adapter."""
    return _merged(site, "direction", context)


def tara_b(site: SiteFactors, _: Any, context: Context) -> LowRankDelta:
    """One coefficient per adapter and direction of the shared singular basis."""
    return _merged(site, "shared", context)


def scaled(site: SiteFactors, _: Any, context: Context) -> LowRankDelta:
    """One coefficient per adapter."""
    return _merged(site, "adapter", context)


def _merged(site: SiteFactors, kind: Coefficients, context: Context) -> LowRankDelta:
    phi = context.inputs["phi"].to(site.device, site.dtype)
    return LowRankDelta(*Directions(site, kind).update(phi))
