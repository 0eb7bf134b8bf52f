"""Weighted sums of deltas: task_arithmetic, linear, cat, svd. Results are factors; nothing is made dense.

Formulas: task arithmetic (arXiv 2212.04089); PEFT's add_weighted_adapter for cat, svd and `compat: peft`.
A plain sum is the same in every space, so these methods have no space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ray_merge.algebra.delta import Delta, LowRankDelta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.truncate import truncate
from ray_merge.errors import MethodError
from ray_merge.methods.catalogue.sums import Concatenate, Linear, Sum, Truncate
from ray_merge.methods.context import Context


def task_arithmetic(site: SiteFactors, p: Sum, context: Context) -> Delta:
    """Sum weight_i * delta_i, times lambda, divided by the sum of weights if `normalize`."""
    return site.sum(_coefficients(p.weight, p.normalize))


def linear(site: SiteFactors, p: Linear, context: Context) -> Delta:
    """The same, normalised by default; `compat: peft` multiplies sums of factors, cross terms included."""
    coefficients = _coefficients(p.weight, p.normalize)
    return _cross_terms(site, coefficients, context) if p.compat == "peft" else site.sum(coefficients)


def cat(site: SiteFactors, p: Concatenate, context: Context) -> LowRankDelta:
    """The weighted sum as concatenated factors; rank is the sum of ranks."""
    return LowRankDelta(*site.weighted_sum(p.weight))


def svd(site: SiteFactors, p: Truncate, context: Context) -> LowRankDelta:
    """The weighted sum truncated to `rank`; what that loses is the delta's `truncation_error`."""
    B_OR, A_RI = site.weighted_sum(p.weight)
    B_OK, A_KI, error = truncate(B_OR, A_RI, rank=p.rank)
    return LowRankDelta(B_OK, A_KI, truncation_error=error)


def _coefficients(weights: Sequence[float], normalize: bool) -> list[float]:
    divisor = sum(weights) if normalize else 1.0
    return [weight / divisor for weight in weights]


def _cross_terms(site: SiteFactors, coefficients: Sequence[float], context: Context) -> LowRankDelta:
    """(sum_i sqrt|c_i| B_i) (sum_i sign(c_i) sqrt|c_i| A_i) with c_i = weight_i * scale_i, as PEFT has it."""
    touching = [index for index, rank in enumerate(site.ranks) if rank]
    if len({site.ranks[index] for index in touching}) > 1:
        listed = ", ".join(f"{context.names[index]} {site.ranks[index]}" for index in touching)
        raise MethodError(
            f"{context.site}: linear with compat peft needs equal ranks, but they are {listed}; "
            "remove `compat: peft` for the exact sum"
        )
    if not touching:
        return LowRankDelta(*site.weighted_sum(coefficients))
    shares = [coefficients[index] * site.scales[index] for index in touching]
    roots = [math.sqrt(abs(share)) for share in shares]
    B_ORT = torch.stack([site.B[index] * root for index, root in zip(touching, roots, strict=True)])
    A_RIT = torch.stack(
        [
            site.A[index] * math.copysign(root, share)
            for index, root, share in zip(touching, roots, shares, strict=True)
        ]
    )
    return LowRankDelta(B_ORT.sum(dim=0), A_RIT.sum(dim=0))
