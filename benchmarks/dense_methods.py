"""The formula of every merge method written down plainly on dense deltas, the way the publications have it.

Owns: what site_kernels.py holds our kernels against. Written from the papers' formulas (`ray-merge methods` names the
papers) and not from our kernels: whole (O, I) matrices, torch's own SVD, sort and FFT, no thought for memory. Input
is the stack of deltas (T, O, I), or the factors where a method is about factors; every weight is 1 and lambda is 1
unless a parameter says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ray_merge import Moments
from ray_merge.spec import Factor

DENSITY, GAMMA, CONSENSUS_LAMBDA, PCB_DENSITY = 0.2, 0.01, 0.4, 0.1
CRUMBS_DENSITY, DARE_DENSITY, DELLA_DENSITY, DELLA_EPSILON = 0.9, 0.5, 0.7, 0.07
ISO_COMMON, CART_SHARE, FREE_CUTOFF, ROBUST_DENSITY, ROBUST_LAMBDA = 0.8, 0.04, 0.1, 0.8, 2.0
SVD_RANK, LEGO_ITERATIONS = 16, 10
WUDI_STEPS, WUDI_TIMED_STEPS = 300, 3
REGMEAN_OFF_DIAGONAL, REGMEAN_RIDGE, FISHER_FLOOR = 0.9, 1e-6, 1e-6


@dataclass(frozen=True)
class Dense:
    """One method in dense torch.

    Attributes:
        make: (deltas (T, O, I), factors) -> merged (O, I).
        parameters: that ours is given, so that both do the same.
        method: its name in the registry, where the key in DENSE is another.
        dtype: that the published code works in.
        random: draws or starts at random, so that only norms can be compared.
        inputs: of the factors, arguments that ours is given beside them (moments).
        timed: a cheaper piece of the published algorithm that is timed instead of `make`.
        times: how often that piece runs.
    """

    make: Callable[[Tensor, Sequence[Factor]], Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    dtype: torch.dtype = torch.float32
    random: bool = False
    inputs: Callable[[Sequence[Factor]], Mapping[str, Any]] = lambda _: {}
    timed: Callable[[Tensor, Sequence[Factor]], Tensor] | None = None
    times: int = 1


def top(tau: Tensor, count: int) -> Tensor:
    """The entries of each of T matrices with the `count` largest magnitudes, the others zero."""
    flat = tau.flatten(1)
    if count >= flat.shape[1]:
        return tau
    least = flat.abs().kthvalue(flat.shape[1] - count + 1, dim=1).values if count else torch.inf
    return torch.where(tau.abs() >= torch.as_tensor(least).view(-1, 1, 1), tau, 0.0)


def trim(tau: Tensor, density: float) -> Tensor:
    """The largest share `density` of each."""
    return top(tau, max(1, int(density * tau[0].numel())))


def elect(tau: Tensor, *, divide: bool = True) -> Tensor:
    """Sign of the sum of values; the mean (or sum) of the entries that agree with it."""
    agree = (tau.sign() == tau.sum(0).sign()) & (tau != 0)
    total = (tau * agree).sum(0)
    return total / agree.sum(0).clamp_min(1) if divide else total


def knots(tau: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """`rule` on S V_i of the SVD of [tau_1 .. tau_T]."""
    U, s, Vt = torch.linalg.svd(torch.cat(list(tau), dim=1), full_matrices=False)
    keep = s > 1e-5
    blocks = torch.stack((s[keep, None] * Vt[keep]).split(tau.shape[2], dim=1))
    blocks[blocks.abs() <= 1e-12 * blocks.abs().max()] = 0  # zero but for rounding: it would vote
    return U[:, keep] @ rule(blocks)


def core(tau: Tensor, factors: Sequence[Factor], rule: Callable[[Tensor], Tensor]) -> Tensor:
    """`rule` on the core matrices U_B^T tau_i V_A."""
    U = torch.linalg.svd(torch.cat([f.B.to(tau.dtype) for f in factors], dim=1), full_matrices=False).U
    Vt = torch.linalg.svd(torch.cat([f.A.to(tau.dtype) for f in factors]), full_matrices=False).Vh
    return U @ rule(U.T @ tau @ Vt.T) @ Vt


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank."""
    U, s, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank]


def drop(tau: Tensor) -> Tensor:
    """DARE."""
    return tau * torch.bernoulli(torch.full_like(tau, DARE_DENSITY)) / DARE_DENSITY


def crumbs(tau: Tensor) -> Tensor:
    """What Model Breadcrumbs leaves: neither the largest `gamma` nor the smallest."""
    n_entries = tau[0].numel()
    above = int(GAMMA * n_entries)
    return top(tau, above + int(CRUMBS_DENSITY * n_entries)) - top(tau, above)


def magprune(tau: Tensor) -> Tensor:
    """DELLA: keep by rank of magnitude within the row, divide by the probability."""
    order = tau.abs().argsort(dim=2).argsort(dim=2)
    rising = order.to(tau.dtype) / (tau.shape[2] - 1)
    kept = DELLA_DENSITY - DELLA_EPSILON + 2 * DELLA_EPSILON * rising
    return tau * torch.bernoulli(kept) / kept


def claimed(tau: Tensor, merged: Tensor) -> Tensor:
    """TALL masks: entries of `merged` that two adapters claim."""
    votes = (tau.abs() >= CONSENSUS_LAMBDA * (merged - tau).abs()).sum(0)
    return torch.where(votes >= 2, merged, 0.0)


def pcb(tau: Tensor) -> Tensor:
    """PCB-Merging: softmax of size, times the sum of softmaxes of agreement; the best scores average."""

    def unit(values: Tensor) -> Tensor:
        return (values - values.min()) / (values.max() - values.min())

    def softmax(values: Tensor) -> Tensor:
        return values.flatten().softmax(0).view_as(values)

    scores = torch.stack(
        [
            softmax(len(tau) * unit(one**2))
            * torch.stack([softmax(unit(one * other)) for other in tau]).sum(0)
            for one in tau
        ]
    )
    kept = trim(scores, PCB_DENSITY)
    divisor = kept.sum(0)
    return (kept * tau).sum(0) / torch.where(divisor == 0, 1.0, divisor)


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows."""
    U, _, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vt


def tsv(tau: Tensor, factors: Sequence[Factor]) -> Tensor:
    """TSV-Merge with each adapter's own rank."""
    found = [torch.linalg.svd(one, full_matrices=False) for one in tau]
    ranks = [factor.A.shape[0] for factor in factors]
    U = torch.cat([u[:, :rank] for (u, _, _), rank in zip(found, ranks, strict=True)], dim=1)
    s = torch.cat([s[:rank] for (_, s, _), rank in zip(found, ranks, strict=True)])
    Vt = torch.cat([vt[:rank] for (_, _, vt), rank in zip(found, ranks, strict=True)])
    return (polar(U) * s) @ polar(Vt)


def iso_c(tau: Tensor, factors: Sequence[Factor]) -> Tensor:
    """Iso-C over the directions that there are."""
    U, s, Vt = torch.linalg.svd(tau.sum(0), full_matrices=False)
    n_all = min(sum(factor.A.shape[0] for factor in factors), len(s))
    return s[:n_all].mean() * U[:, :n_all] @ Vt[:n_all]


def iso_cts(tau: Tensor, factors: Sequence[Factor]) -> Tensor:
    """Iso-CTS over the directions that there are."""
    n_all = min(sum(factor.A.shape[0] for factor in factors), *tau[0].shape)
    n_task = min(round((n_all - int(n_all * ISO_COMMON)) / len(tau)), n_all // len(tau))
    n_common = n_all - n_task * len(tau)
    U, s, Vt = (part[..., :n_common] for part in _svd_columns(tau.sum(0)))
    lefts, values, rights = [U], [s], [Vt]
    for one in tau:
        own = _svd_columns(one - U @ (U.T @ one))
        for kept, part in zip((lefts, values, rights), own, strict=True):
            kept.append(part[..., :n_task])
    flat = torch.cat(values).mean()
    return flat * polar(torch.cat(lefts, dim=1)) @ polar(torch.cat(rights, dim=1)).T


def _svd_columns(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V with singular vectors as columns."""
    U, s, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U, s, Vt.T


def cart(tau: Tensor) -> Tensor:
    """CART: the mean and what is cut from each delta around it."""
    mean = tau.mean(0)
    rank = math.ceil(CART_SHARE * min(mean.shape))
    return mean + torch.stack([truncated(one - mean, rank) for one in tau]).sum(0)


def lego(factors: Sequence[Factor]) -> Tensor:
    """LoRA-LEGO with plain k-means from random pairs."""
    b = torch.cat([factor.B.T for factor in factors]) * factors[0].scale ** 0.5
    a = torch.cat([factor.A for factor in factors]) * factors[0].scale ** 0.5
    rank = max(factor.A.shape[0] for factor in factors)
    raw = torch.cat([b, a], dim=1)
    points = torch.cat([b / b.norm(dim=1, keepdim=True), a / a.norm(dim=1, keepdim=True)], dim=1)
    centres = points[torch.randperm(len(points))[:rank]]
    for _ in range(LEGO_ITERATIONS):
        labels = torch.cdist(points, centres).argmin(1)
        centres = torch.stack(
            [points[labels == k].mean(0) if (labels == k).any() else centres[k] for k in range(rank)]
        )
    merged = torch.zeros(b.shape[1], a.shape[1])
    used = [k for k in range(rank) if (labels == k).any()]
    for k in used:
        members = raw[labels == k]
        centre = members.mean(0)
        centre = centre * members.abs().amax(1).mean() / centre.abs().max()
        merged += torch.outer(centre[: b.shape[1]], centre[b.shape[1] :])
    return merged * (rank / len(used)) ** 0.5


def robust(factors: Sequence[Factor]) -> Tensor:
    """RobustMerge: pruned factors, each rank scaled by what its row of A lost, over all adapters."""
    A = torch.stack([factor.A for factor in factors])
    B = torch.stack([factor.B for factor in factors])
    pruned_A, pruned_B = trim(A, ROBUST_DENSITY), trim(B, ROBUST_DENSITY)
    lost = A.abs().sum(2) / pruned_A.abs().sum(2)
    shares = lost / lost.sum(0)
    scales = torch.tensor([factor.scale for factor in factors]).view(-1, 1, 1)
    return ROBUST_LAMBDA * ((pruned_B * scales) @ (pruned_A * shares[:, :, None])).sum(0)


def free(tau: Tensor) -> Tensor:
    """FR-Merging: every delta without its low frequencies, summed."""
    rows, columns = tau.shape[1:]
    u = torch.fft.fftfreq(rows, 1 / rows)[:, None]
    v = torch.fft.fftfreq(columns, 1 / columns)[None, :]
    mask = torch.sqrt(u**2 + v**2) >= FREE_CUTOFF * min(rows, columns)
    return torch.stack([torch.fft.ifft2(torch.fft.fft2(one) * mask).real for one in tau]).sum(0)


def wudi(tau: Tensor) -> Tensor:
    """WUDI's minimiser: N H^+ on dense (I, I) matrices; nobody publishes this form."""
    weights = 1 / tau.pow(2).sum((1, 2))
    gram = torch.einsum("t,toi,toj->ij", weights, tau, tau)
    pulled = sum(w * one @ (one.T @ one) for w, one in zip(weights, tau, strict=True))
    return pulled @ torch.linalg.pinv(gram, hermitian=True, rtol=1e-10)


def wudi_steps(tau: Tensor) -> Tensor:
    """A few of the published steps of Adam."""
    merged = tau.sum(0).requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(WUDI_TIMED_STEPS):
        optimiser.zero_grad()
        loss = sum((((merged - one) @ one.T) ** 2).sum() / (one**2).sum() for one in tau)
        loss.backward()
        optimiser.step()
    return merged.detach()


def unified(tau: Tensor) -> Tensor:
    """The largest entry that agrees with the elected sign."""
    gamma = tau.sum(0).sign()
    return gamma * (tau * gamma).clamp_min(0).amax(0)


def ties(tau: Tensor) -> Tensor:
    """Trim, elect, average."""
    return elect(trim(tau, DENSITY))


@cache
def _inputs_like(count: int, rows: int, columns: int) -> tuple[Tensor, ...]:
    """Seeded inputs with a mean for each task, (rows, columns) float64; cached, so that no timing holds them."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(rows, columns, generator=generator, dtype=torch.float64) + 0.3 for _ in range(count)
    )


@cache
def _grams(count: int, columns: int) -> tuple[Moments, ...]:
    """Of fewer token rows than inputs, as short calibration data have."""
    samples = _inputs_like(count, columns // 2, columns)
    return tuple(Moments(X.T @ X, X.mean(0), len(X)) for X in samples)


def moments(factors: Sequence[Factor]) -> dict[str, Any]:
    """Seeded moments of the inputs of a weight."""
    return {"moments": _grams(len(factors), factors[0].A.shape[1])}


def fishers(factors: Sequence[Factor]) -> dict[str, Any]:
    """Seeded squares, (O, I)."""
    shape = (factors[0].B.shape[0], factors[0].A.shape[1])
    return {"moments": [X.square() for X in _inputs_like(len(factors), *shape)]}


def regmean(tau: Tensor, grams: Sequence[Moments]) -> Tensor:
    """The authors' sums and inverse, on deltas; the ridge is ours."""
    eye = torch.eye(tau.shape[2], dtype=tau.dtype)
    made = [one.gram.to(tau.dtype) / one.count for one in grams]
    made = [REGMEAN_OFF_DIAGONAL * G + (1 - REGMEAN_OFF_DIAGONAL) * torch.diag(G.diagonal()) for G in made]
    ridge = REGMEAN_RIDGE * torch.stack([G.diagonal() for G in made]).mean()
    made = [G + ridge * eye for G in made]
    right = sum(G @ delta.T for G, delta in zip(made, tau, strict=True))
    return (torch.inverse(sum(made)) @ right).T


def fisher(tau: Tensor, diagonals: Sequence[Tensor]) -> Tensor:
    """fusion_bench's formula, for a model of one weight."""
    F = torch.stack(list(diagonals)).to(tau.dtype)
    shares = 1 / (F.flatten(1).norm(dim=1) + FISHER_FLOOR)
    weighted = (shares / shares.sum()).view(-1, 1, 1) * (F + FISHER_FLOOR)
    return (weighted * tau).sum(0) / weighted.sum(0)


F64 = torch.float64
CRUMBS = {"density": CRUMBS_DENSITY, "gamma": GAMMA, "scope": "tensor"}
TRIMMED = {"density": DENSITY, "scope": "tensor"}
DROPPED = {"density": DARE_DENSITY}
SAMPLED = {"density": DELLA_DENSITY, "epsilon": DELLA_EPSILON}

DENSE: Mapping[str, Dense] = {
    "task_arithmetic": Dense(lambda tau, _: tau.sum(0)),
    "linear": Dense(lambda tau, _: tau.mean(0)),
    "cat": Dense(lambda tau, _: tau.sum(0)),
    "svd": Dense(lambda tau, _: truncated(tau.sum(0), SVD_RANK), {"rank": SVD_RANK}),
    "magnitude_prune": Dense(lambda tau, _: trim(tau, DENSITY).sum(0), TRIMMED),
    "ties": Dense(lambda tau, _: ties(tau), TRIMMED),
    "ties in core": Dense(
        lambda tau, f: core(tau, f, ties), {**TRIMMED, "space": "core"}, method="ties", dtype=F64
    ),
    "knots_ties": Dense(lambda tau, _: knots(tau, ties), TRIMMED, dtype=F64),
    "dare_linear": Dense(lambda tau, _: drop(tau).sum(0), DROPPED, random=True),
    "dare_ties": Dense(lambda tau, _: elect(drop(tau)), DROPPED, random=True),
    "knots_dare_ties": Dense(
        lambda tau, _: knots(tau, lambda x: elect(drop(x))), DROPPED, dtype=F64, random=True
    ),
    "breadcrumbs": Dense(lambda tau, _: crumbs(tau).sum(0), CRUMBS),
    "breadcrumbs_ties": Dense(lambda tau, _: elect(crumbs(tau)), CRUMBS),
    "della": Dense(lambda tau, _: elect(magprune(tau)), SAMPLED, random=True),
    "della_linear": Dense(lambda tau, _: magprune(tau).sum(0), SAMPLED, random=True),
    "consensus": Dense(lambda tau, _: claimed(tau, tau.sum(0)), {"mask_lambda": CONSENSUS_LAMBDA}),
    "consensus_ties": Dense(
        lambda tau, _: claimed(tau, elect(trim(tau, DENSITY), divide=False)),
        {**TRIMMED, "mask_lambda": CONSENSUS_LAMBDA},
    ),
    "pcb": Dense(lambda tau, _: pcb(tau), {"density": PCB_DENSITY}),
    "emr": Dense(lambda tau, _: unified(tau)),
    "tsv_m": Dense(tsv),
    "iso_c": Dense(iso_c),
    "iso_cts": Dense(iso_cts, {"common": ISO_COMMON}),
    "cart": Dense(lambda tau, _: cart(tau)),
    "lora_lego": Dense(lambda _, factors: lego(factors), random=True),
    "robustmerge": Dense(
        lambda _, factors: robust(factors), {"density": ROBUST_DENSITY, "lambda": ROBUST_LAMBDA}
    ),
    "free": Dense(lambda tau, _: free(tau), {"cutoff": FREE_CUTOFF}),
    "wudi": Dense(
        lambda tau, _: wudi(tau.double()),
        timed=lambda tau, _: wudi_steps(tau),
        times=WUDI_STEPS // WUDI_TIMED_STEPS,
    ),
    "regmean": Dense(
        lambda tau, f: regmean(tau, moments(f)["moments"]),
        {"off_diagonal": REGMEAN_OFF_DIAGONAL, "ridge": REGMEAN_RIDGE},
        dtype=F64,
        inputs=moments,
    ),
    "fisher": Dense(
        lambda tau, f: fisher(tau, fishers(f)["moments"]),
        {"floor": "absolute", "epsilon": FISHER_FLOOR},
        inputs=fishers,
    ),
}
"""Row of site_kernels.py -> its dense form."""
