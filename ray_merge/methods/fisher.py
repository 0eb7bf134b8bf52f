"""Fisher merging: entries averaged by how much each adapter's loss depends on them.

Formula: arXiv 2111.09832, for W_i = W0 + tau_i and the diagonal F_i of adapter i's Fisher information

    delta = sum_i w_i F^_i * tau_i / sum_i w_i F^_i        entry by entry; the base weight cancels.

F^_i = F_i / |F_i| + epsilon times the mean of all F_i / |F_i| at the site (`floor: relative`; without `normalize`, the
norms are 1). `floor: absolute` is fusion_bench's and MergeLM's arithmetic: w_i c_i (F_i + epsilon), c_i proportional
to 1 / (|F_i| + epsilon). Entries that no adapter's loss depends on are averaged by weight alone where the floor is
relative.

An adapter that does not touch the site counts too: its weight there is W0, and its Fisher information says how much it
depends on that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ray_merge.algebra.delta import BlockDelta, Delta
from ray_merge.algebra.grid import chunk_spans
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.catalogue.fisher import Fisher
from ray_merge.methods.context import Context
from ray_merge.methods.statistics import FisherRows, statistics, weighted_mean

Shares = Sequence[tuple[float, float]]
"""(a, b) of each adapter: an entry counts with a F + b."""


def fisher(site: SiteFactors, p: Fisher, context: Context) -> Delta:
    """The weighted mean, by rows.

    Raises:
        MethodError: no Fisher information, and an average was not asked for.
    """
    found = statistics(site, context, p.without_moments)
    if found is None:
        return weighted_mean(site, p.weight)
    diagonals: list[FisherRows] = [found[adapter] for adapter in range(len(site))]
    shares = (_absolute if p.floor == "absolute" else _relative)(site, p, diagonals)
    spans = chunk_spans(site.shape)

    def rule(index: int) -> torch.Tensor:
        total = torch.zeros_like(site.delta_chunk(0, index))
        divisor = torch.zeros_like(total)
        for adapter, (of_fisher, of_all) in enumerate(shares):
            if p.weight[adapter] == 0:
                continue
            # The squares of small gradients are near the end of float32, and so is what brings them to 1.
            rows_CI = diagonals[adapter].rows(*spans[index]).to(site.device, torch.float64)
            share_CI = rows_CI.mul(of_fisher).add_(of_all).to(site.dtype)
            divisor += share_CI
            total.addcmul_(share_CI, site.delta_chunk(adapter, index))
        return total.div_(divisor)

    return BlockDelta(site.shape, site.dtype, site.device, rule)


def _absolute(site: SiteFactors, p: Fisher, diagonals: Sequence[FisherRows]) -> Shares:
    norms = [diagonal.norm if p.normalize else 1.0 for diagonal in diagonals]
    factors = [own / (norm + p.epsilon) for own, norm in zip(p.weight, norms, strict=True)]
    total = sum(factors)
    return [(factor / total, p.epsilon * factor / total) for factor in factors]


def _relative(site: SiteFactors, p: Fisher, diagonals: Sequence[FisherRows]) -> Shares:
    """In units of the mean entry, so that entries are about 1 whatever the loss is measured in."""
    used = [adapter for adapter, own in enumerate(p.weight) if own]
    inverse = [1 / diagonal.norm if p.normalize and diagonal.norm else 1.0 for diagonal in diagonals]
    means = [_mean(site, diagonals[adapter]) * inverse[adapter] for adapter in used]
    unit = sum(means) / len(means) or 1.0
    return [(own * one / unit, own * p.epsilon) for own, one in zip(p.weight, inverse, strict=True)]


def _mean(site: SiteFactors, diagonal: FisherRows) -> float:
    total = sum(float(diagonal.rows(*span).sum(dtype=torch.float64)) for span in chunk_spans(site.shape))
    return total / (site.shape[0] * site.shape[1])
