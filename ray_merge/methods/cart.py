"""Rank-reduced task vectors around their mean: cart.

Formula: CART (arXiv 2412.12153). With tau_i = weight_i * delta_i and m their mean over all adapters of the merge:
lambda * (m + centred * sum_i SVD_k(tau_i - m)), SVD_k the best approximation of rank k.

An adapter that does not touch the site, or has weight 0, is a delta of zero here: it pulls the mean.
The tau_i - m add up to zero. Where k is no less than their rank nothing is cut off, and the merge is the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_merge.algebra.delta import LowRankDelta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spectrum import added, lift, n_directions, weighted_pairs
from ray_merge.methods.catalogue.cart import Cart, kept
from ray_merge.methods.context import Context


def cart(site: SiteFactors, p: Cart, context: Context) -> LowRankDelta:
    """The mean of the deltas plus what each has of its own, cut to k singular values."""
    pairs = weighted_pairs(site, p.weight)
    left_PR, right_RQ = added(pairs)
    mean_PQ = left_PR @ right_RQ / len(site)
    rank = kept(p.share, p.rank, n_directions(site, p.space))
    merged_PQ = mean_PQ.clone()
    if rank < min(mean_PQ.shape):
        for left_PR, right_RQ in pairs:
            merged_PQ += p.centred * best_approximation(left_PR @ right_RQ - mean_PQ, rank)
    return lift(site.core, merged_PQ, site.dtype)


def best_approximation(M_PQ: Tensor, rank: int) -> Tensor:
    """M with all but its `rank` largest singular values set to zero."""
    U_PK, s_K, Vt_KQ = torch.linalg.svd(M_PQ, full_matrices=False)
    nearest_PQ: Tensor = (U_PK[:, :rank] * s_K[:rank]) @ Vt_KQ[:rank]
    return nearest_PQ
