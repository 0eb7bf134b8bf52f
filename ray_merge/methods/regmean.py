"""RegMean: the weight whose outputs are nearest to each adapter's own on its own inputs.

Formula: arXiv 2212.09849, min_W sum_i w_i E|(W - W_i) x_i|^2 over the inputs x_i of task i's data. With W_i = W0 +
tau_i and G_i = E[x_i x_i^T] the base weight cancels, and the update is

    delta = (sum_i w_i tau_i G~_i) (sum_i w_i G~_i)^-1.

With tau_i = s_i B_i A_i it keeps every B_i and so has factors of rank sum R_i: the A side is one linear system. In
G~_i, what is off the diagonal is multiplied by `off_diagonal` (the authors' remedy for degenerate merges), and the
diagonal gets `ridge` times the mean diagonal of the weighted mean of all G~_i. Inputs that no data show are then
averaged instead of undefined; one adapter, or equal Gram matrices, give the (mean) delta whatever the ridge.

The Gram matrix of each task is divided by its token count, as in fusion_bench, so that tasks count by weight and not by
the amount of their data. An adapter that does not touch the site counts too: its weight there is W0, and its inputs
want to keep it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_merge.algebra.delta import BlockDelta, Delta, LowRankDelta
from ray_merge.algebra.grid import chunk_rows, chunk_spans
from ray_merge.algebra.site import SiteFactors
from ray_merge.errors import MethodError, RunFailed
from ray_merge.methods.catalogue.regmean import RegMean
from ray_merge.methods.context import Context
from ray_merge.methods.statistics import statistics, weighted_mean


@dataclass(frozen=True, slots=True)
class _Gram:
    """w G~ of one adapter, kept apart as `share * gram + diag(extra)` so that nothing of its size is copied.

    Args:
        gram: (I, I) symmetric, float64.
        share: weight times off_diagonal over the number of tokens.
        extra: (I,) what the diagonal has beyond that.
    """

    gram: Tensor
    share: float
    extra: Tensor

    def add_to(self, sum_II: Tensor) -> None:
        """`sum_II` += w G~."""
        sum_II.add_(self.gram, alpha=self.share)
        sum_II.diagonal().add_(self.extra)

    def after(self, X_RI: Tensor) -> Tensor:
        """X w G~, (R, I) float64."""
        return (X_RI @ self.gram).mul_(self.share).addcmul_(X_RI, self.extra)


def regmean(site: SiteFactors, p: RegMean, context: Context) -> Delta:
    """The solution as factors of rank sum R_i, or by rows where an adapter is DoRA.

    Raises:
        MethodError: no moments, or not those of this site.
        RunFailed: the system is singular, which only a ridge of 0 can leave it.
    """
    moments = statistics(site, context, p.without_moments)
    if moments is None:
        return weighted_mean(site, p.weight)
    by_rows = context.inputs.get("input_side", "columns") == "rows"
    return (_solved_dense if site.is_dense else _solved)(site, p, context, moments, by_rows)


def _solved(
    site: SiteFactors, p: RegMean, context: Context, moments: Sequence[Any], by_rows: bool
) -> LowRankDelta:
    """Inputs are the columns of A, or the rows of B, which is then the side that is solved for."""
    sides = [B_IR.T for B_IR in site.B] if by_rows else site.A
    thin = [side_RI.double() * scale for side_RI, scale in zip(sides, site.scales, strict=True)]
    n_inputs = site.shape[0 if by_rows else 1]
    sum_II = torch.zeros(n_inputs, n_inputs, dtype=torch.float64, device=site.device)
    right = [torch.zeros_like(side_RI) for side_RI in thin]
    for place, gram in _grams(moments, p, n_inputs, site.device, context.site):
        gram.add_to(sum_II)
        right[place] = gram.after(thin[place])
        del gram
    ridge = _add_ridge(sum_II, p)
    for right_RI, thin_RI, own in zip(right, thin, p.weight, strict=True):
        right_RI.add_(thin_RI, alpha=ridge * own)
    solved_RI = _solve(sum_II, torch.cat(right), p, context.site).to(site.dtype)
    if by_rows:
        return LowRankDelta(solved_RI.T.contiguous(), torch.cat(site.A))
    return LowRankDelta(torch.cat(site.B, dim=1), solved_RI)


def _solved_dense(
    site: SiteFactors, p: RegMean, context: Context, moments: Sequence[Any], by_rows: bool
) -> BlockDelta:
    """The same for deltas without factors: their products with Gram matrices are summed whole, (O, I) float64."""
    spans = list(enumerate(chunk_spans(site.shape)))
    n_inputs = site.shape[0 if by_rows else 1]
    sum_II = torch.zeros(n_inputs, n_inputs, dtype=torch.float64, device=site.device)
    right_OI = torch.zeros(site.shape, dtype=torch.float64, device=site.device)
    for place, gram in _grams(moments, p, n_inputs, site.device, context.site):
        gram.add_to(sum_II)
        for index, (start, stop) in spans:
            tau_CI = site.delta_chunk(place, index).double()
            if by_rows:
                right_OI.addmm_(gram.gram[:, start:stop], tau_CI, alpha=gram.share)
                right_OI[start:stop].addcmul_(tau_CI, gram.extra[start:stop, None])
            else:
                right_OI[start:stop] += gram.after(tau_CI)
        del gram
    ridge = _add_ridge(sum_II, p)
    for place, own in enumerate(p.weight):
        for index, (start, stop) in spans:
            right_OI[start:stop].add_(site.delta_chunk(place, index), alpha=ridge * own)
    right_RI = right_OI.T if by_rows else right_OI
    solved_RI = _solve(sum_II, right_RI, p, context.site).to(site.dtype)
    solved_OI = (solved_RI.T if by_rows else solved_RI).contiguous()
    step = chunk_rows(site.shape[1])
    return BlockDelta(
        site.shape,
        site.dtype,
        site.device,
        lambda index: solved_OI[index * step : (index + 1) * step].clone(),
    )


def _grams(
    moments: Sequence[Any], p: RegMean, n_inputs: int, device: torch.device, site: str
) -> Iterator[tuple[int, _Gram]]:
    """(place, w G~) of the adapters that have a weight; a matrix is kept no longer than the caller keeps it."""
    for place, own in enumerate(p.weight):
        if own:
            yield place, _gram(moments[place], own, p.off_diagonal, n_inputs, device, site)


def _gram(
    found: Any, own: float, off_diagonal: float, n_inputs: int, device: torch.device, site: str
) -> _Gram:
    gram_II: Tensor = found.gram
    if gram_II.shape != (n_inputs, n_inputs):
        raise MethodError(
            f"the Gram matrix for {site or 'this weight'} is {tuple(gram_II.shape)}, but the weight takes {n_inputs} "
            "inputs; give the moments of its own inputs"
        )
    gram_II = gram_II.to(device, torch.float64)
    factor = own / max(found.count, 1)
    return _Gram(gram_II, factor * off_diagonal, gram_II.diagonal() * (factor * (1 - off_diagonal)))


def _add_ridge(sum_II: Tensor, p: RegMean) -> float:
    """Add the ridge to the sum of w G~; returns what it is for an adapter of weight 1."""
    # Without any input at all nothing is relative to anything; the ridge alone then averages the deltas.
    mean = float(sum_II.diagonal().mean()) or sum(p.weight)
    sum_II.diagonal().add_(p.ridge * mean)
    return p.ridge * mean / sum(p.weight)


def _solve(sum_II: Tensor, right_RI: Tensor, p: RegMean, site: str) -> Tensor:
    """X with X sum_II = right_RI, (R, I) float64."""
    root_II, failed = torch.linalg.cholesky_ex(sum_II)
    # Of each input, the share that those before it do not explain: rounding alone where there is none.
    unexplained = (root_II.diagonal().square() / sum_II.diagonal()).min()
    if int(failed) or not float(unexplained) > len(sum_II) * torch.finfo(torch.float64).eps:
        raise RunFailed(
            f"RegMean has no unique solution{f' at {site}' if site else ''}: with off_diagonal {p.off_diagonal:g} and "
            f"ridge {p.ridge:g} the Gram matrix of its {len(sum_II)} inputs is singular; set `ridge: 1e-6`, take more "
            "calibration data, or set off_diagonal below 1"
        )
    return torch.cholesky_solve(right_RI.T, root_II).T
