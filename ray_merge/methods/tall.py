"""Keep what several adapters claim of a merged update: consensus, consensus_ties.

Formula: TALL-masks and Consensus (arXiv 2405.07813): adapter i claims an entry where
|tau_i| >= mask_lambda_i |tau - tau_i|, tau being the merged update; entries with fewer claims than `votes` become
zero. tau is the sum of the deltas, or the sum that TIES elects (their `dis-sum`). Weights multiply the deltas
first. Their code compares with > instead of >=, which differs only on exact ties. `compat: authors` trims and
breaks ties of the election as in `ties.py`.
"""

from __future__ import annotations

from torch import Tensor

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spaces import Rule, Space
from ray_merge.methods.catalogue.tall import Consensus, ConsensusTies
from ray_merge.methods.catalogue.ties import kept_entries
from ray_merge.methods.context import Context
from ray_merge.methods.dare import weighted_sum
from ray_merge.methods.election import election
from ray_merge.methods.ties import trimmed


def consensus(site: SiteFactors, p: Consensus, context: Context) -> Delta:
    """The weighted sum where enough adapters claim it."""
    space = site.space(p.space)
    return space.lift(claimed(space, weighted_sum(space.chunk, p.weight), p))


def consensus_ties(site: SiteFactors, p: ConsensusTies, context: Context) -> Delta:
    """The elected sum where enough adapters claim it; claims are made with whole deltas, not with trimmed ones."""
    space = site.space(p.space)
    thresholds = context.thresholds or [
        (space.threshold(adapter, kept_entries(space.n_entries, share, p.compat)),)
        for adapter, share in enumerate(p.density)
    ]
    elected = election(space, trimmed(space, thresholds), p.weight, compat=p.compat, divide=False)
    return space.lift(claimed(space, elected, p))


def claimed(space: Space, merged: Rule, p: Consensus | ConsensusTies) -> Rule:
    """The rule that keeps those entries of `merged` that get `votes` claims."""

    def rule(index: int) -> Tensor:
        total = merged(index)
        votes = total.new_zeros(total.shape)
        for adapter, (weight, factor) in enumerate(zip(p.weight, p.mask_lambda, strict=True)):
            own = space.chunk(adapter, index) * weight
            votes += own.abs() >= (total - own).abs_().mul_(factor)
        return total.masked_fill_(votes < p.votes, 0.0)

    return rule
