"""RobustMerge: prune the factors, scale every rank by what its row of A lost, normalise over adapters.

Formula: arXiv 2502.17159, algorithm 1. a~_ij, b~_ij: the entries of A_i and of B_i with the largest magnitudes;
s_ij = |a_ij|_1 / |a~_ij|_1; s~_ij = s_ij / sum_i s_ij; lambda * sum_i weight_i scale_i B~_i diag(s~_i) A~_i.
Rank j of one adapter is compared with rank j of another, so the result depends on the gauge of the factors by
nature. Where adapters differ in rank, the sum of s_ij is over those that have a rank j; a row that lost
everything has s_ij = 0. What `compat` changes:

    tara      TARA's code: one entry more is kept; 1e-6 is added to both divisors, so that a row that lost
              everything takes the share of all others
    authors   their script: as many entries as in tara; an adapter's scales below their own 80th percentile are raised
              to it; sum_i A~_i and sum_i B~_i diag(s~_i) are merged apart and multiplied, cross terms included.
              It fuses each with 2: write `lambda: 4` for its numbers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ray_merge.algebra.delta import LowRankDelta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.sparsify import magnitude_threshold, trim
from ray_merge.errors import MethodError
from ray_merge.methods.catalogue.robust import RobustMerge
from ray_merge.methods.context import Context

TARA_EPSILON = 1e-6
UNRAISED_SHARE = 0.2
"""The authors' att_ratio: the share of an adapter's scales that keep their own value."""


def robustmerge(site: SiteFactors, p: RobustMerge, context: Context) -> LowRankDelta:
    """The merged update: rank sum R_i, or the common rank with `compat: authors`."""
    pruned_B = _pruned(site.B, p)
    pruned_A = _pruned(site.A, p)
    coefficients = [own * scale for own, scale in zip(p.weight, site.scales, strict=True)]
    if p.compat == "authors":
        return _merged_apart(site, pruned_B, pruned_A, coefficients, context)
    epsilon = TARA_EPSILON if p.compat == "tara" else 0.0
    shares = _normalised(
        [_lost(A_RI, kept_RI, epsilon) for A_RI, kept_RI in zip(site.A, pruned_A, strict=True)], epsilon
    )
    A_RI = torch.cat(
        [
            kept_RI * (share_R * own).to(site.dtype)[:, None]
            for kept_RI, share_R, own in zip(pruned_A, shares, coefficients, strict=True)
        ]
    )
    return LowRankDelta(torch.cat(pruned_B, dim=1), A_RI)


def kept_entries(n_entries: int, density: float, compat: str) -> int:
    """How many entries of one factor survive."""
    if density >= 1:
        return n_entries
    if compat == "paper":
        return min(n_entries, max(1, int(density * n_entries)))
    # Both codes keep what is at or above the int(n (1 - mask_ratio))-th smallest magnitude.
    return min(n_entries, n_entries - int(n_entries * (1 - density)) + 1)


def _pruned(factors: Sequence[Tensor], p: RobustMerge) -> list[Tensor]:
    return [_prune(factor, share, p.compat) for factor, share in zip(factors, p.density, strict=True)]


def _prune(factor: Tensor, density: float, compat: str) -> Tensor:
    n_entries = factor.numel()
    kept = kept_entries(n_entries, density, compat)
    if kept == n_entries:
        return factor
    whole: Callable[[], list[Tensor]] = lambda: [factor]  # noqa: E731 - a pass over one chunk
    return trim(factor, magnitude_threshold(whole, n_entries, kept))


def _lost(A_RI: Tensor, kept_RI: Tensor, epsilon: float) -> Tensor:
    """s_i: how much larger each row of A was, (R,), float64; 0 where nothing is left to enlarge."""
    whole_R = A_RI.abs().sum(dim=1, dtype=torch.float64)
    kept_R = kept_RI.abs().sum(dim=1, dtype=torch.float64)
    return _ratio(whole_R, kept_R + epsilon)


def _normalised(scales: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """s~_i: each adapter's scales over the sum of all adapters' at the same rank."""
    total_R = torch.nn.utils.rnn.pad_sequence(list(scales)).sum(dim=1) + epsilon
    return [_ratio(scale_R, total_R[: len(scale_R)]) for scale_R in scales]


def _ratio(numerator: Tensor, divisor: Tensor) -> Tensor:
    """The quotient, 0 where the divisor is 0."""
    return torch.where(divisor > 0, numerator / divisor.masked_fill(divisor == 0, 1.0), 0.0)


def _merged_apart(
    site: SiteFactors,
    pruned_B: Sequence[Tensor],
    pruned_A: Sequence[Tensor],
    coefficients: Sequence[float],
    context: Context,
) -> LowRankDelta:
    """(sum_i r_i B~_i diag(s~_i)) (sum_i sign_i r_i A~_i), r_i^2 sign_i = weight_i scale_i."""
    touching = [index for index, rank in enumerate(site.ranks) if rank]
    if len({site.ranks[index] for index in touching}) > 1:
        listed = ", ".join(f"{context.names[index]} {site.ranks[index]}" for index in touching)
        raise MethodError(
            f"{context.site}: robustmerge with compat authors adds up factors and needs equal ranks, but they are "
            f"{listed}; remove `compat: authors`"
        )
    if not touching:
        return LowRankDelta(*site.weighted_sum(coefficients))
    shares = _normalised([_raised(_lost(site.A[index], pruned_A[index], 0.0)) for index in touching], 0.0)
    B_OR, A_RI = torch.zeros_like(site.B[touching[0]]), torch.zeros_like(site.A[touching[0]])
    for index, share_R in zip(touching, shares, strict=True):
        root = math.sqrt(abs(coefficients[index]))
        B_OR += pruned_B[index] * (share_R * root).to(site.dtype)
        A_RI += pruned_A[index] * math.copysign(root, coefficients[index])
    return LowRankDelta(B_OR, A_RI)


def _raised(scale_R: Tensor) -> Tensor:
    """Scales below the adapter's own percentile lifted to it."""
    floor = scale_R.sort().values[int(len(scale_R) * (1 - UNRAISED_SHARE))]
    return scale_R.clamp_min(floor)
