"""LoRA-LEGO: take adapters apart into rank-one pairs, cluster the pairs, build one adapter of the centroids.

Formula: arXiv 2409.16167. Pair j of adapter i is (b_ij, a_ij); k-means over [b / |b|, a / |a|]; the centroid (b_k, a_k)
of a cluster is the mean of its raw pairs times mean |pair|_inf / |centroid|_inf (parameter reweighting); the result is
sqrt(r / K) sum_k b_k a_k^T (output reweighting). No code of the authors was found; TARA's was read.

Chosen here: weight_i scale_i is split evenly between b and a, its sign in a. A pair without an update (b or a is 0)
has no direction and is left out. b a^T = (-b)(-a)^T, so pairs are compared up to their common sign (`compat: tara`
does not). Clusters that end empty do not count in K. Pairs are first sorted by a random projection that ignores that
sign: neither the order of adapters nor that of ranks reaches a number. Distances come from the (N, N) Gram matrix of
the pairs alone, and a centroid is a column of coefficients: k-means never sees a vector of length O + I.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_merge.algebra.delta import LowRankDelta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.sparsify import mask_seed
from ray_merge.methods.catalogue.lego import LoraLego
from ray_merge.methods.context import Context

SAME_POINT = 1e-12
"""Squared distances (at most 8) below it are rounding: a centre there would start a cluster twice."""


@dataclass(frozen=True, slots=True)
class Pool:
    """All pairs with an update, float64, in an order that follows from their values.

    Args:
        B_NO: left vectors.
        A_NI: right vectors; b a^T is the pair's update, weight and scale included.
        largest: pairs of the adapter that has the most.
    """

    B_NO: Tensor
    A_NI: Tensor
    largest: int

    def gram(self) -> Tensor:
        """(N, N) inner products of [b / |b|, a / |a|]; the diagonal is 2."""
        left_NN, right_NN = (
            v @ v.T / torch.outer(v.norm(dim=1), v.norm(dim=1)) for v in (self.B_NO, self.A_NI)
        )
        return left_NN + right_NN


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which cluster each pair is in, and with what sign.

    Args:
        labels: (N,), cluster of each pair.
        signs: (N,), 1 or -1, float64.
        count: clusters that were asked for.
    """

    labels: Tensor
    signs: Tensor
    count: int

    def means(self) -> Tensor:
        """(N, K) coefficients: column k makes the mean of cluster k's signed pairs; zero where it is empty."""
        onehot_NK = torch.nn.functional.one_hot(self.labels, self.count).to(self.signs.dtype)
        return onehot_NK * self.signs[:, None] / onehot_NK.sum(dim=0).clamp_min(1)


def lora_lego(site: SiteFactors, p: LoraLego, context: Context) -> LowRankDelta:
    """The merged adapter; its rank is the number of clusters that are not empty."""
    pool = pairs(site, p.weight, context)
    n_pairs = len(pool.B_NO)
    if not n_pairs:
        return LowRankDelta(site.B[0].new_zeros(site.shape[0], 0), site.A[0].new_zeros(0, site.shape[1]))
    count = p.rank or pool.largest
    if count >= n_pairs:
        ones_N = torch.ones(n_pairs, dtype=torch.float64, device=site.device)
        found = Clusters(torch.arange(n_pairs, device=site.device), ones_N, n_pairs)
    else:
        found = tightest(pool.gram(), count, p, context)
    return assemble(pool, found, p, site.dtype)


def pairs(site: SiteFactors, weight: tuple[float, ...], context: Context) -> Pool:
    """Every pair of every adapter, sorted."""
    probe_O, probe_I = (probe.to(site.device) for probe in _probes(site.shape, context))
    left, right, keys, counts = [], [], [], [0]
    for B_OR, A_RI, scale, own in zip(site.B, site.A, site.scales, weight, strict=True):
        coefficient = own * scale
        b_RO, a_RI = B_OR.T.double().contiguous(), A_RI.double()
        alive_R = (b_RO != 0).any(dim=1) & (a_RI != 0).any(dim=1)
        if coefficient == 0 or not bool(alive_R.any()):
            continue
        root = math.sqrt(abs(coefficient))
        b_RO, a_RI = b_RO[alive_R], a_RI[alive_R]
        keys.append((b_RO @ probe_O) * (a_RI @ probe_I) / (b_RO.norm(dim=1) * a_RI.norm(dim=1)))
        left.append(b_RO * root)
        right.append(a_RI * math.copysign(root, coefficient))
        counts.append(len(b_RO))
    if not keys:
        empty = torch.zeros(0, dtype=torch.float64, device=site.device)
        return Pool(empty.view(0, 0), empty.view(0, 0), 0)
    order_N = torch.cat(keys).argsort(stable=True)
    return Pool(torch.cat(left)[order_N], torch.cat(right)[order_N], max(counts))


def _probes(shape: tuple[int, int], context: Context) -> tuple[Tensor, Tensor]:
    generator = _generator(context, "probe", 0)
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in shape)  # type: ignore[return-value]


def _generator(context: Context, purpose: str, index: int) -> torch.Generator:
    seed = mask_seed(context.seed, context.site, f"lora_lego {purpose}", index)
    return torch.Generator().manual_seed(seed)


def tightest(gram_NN: Tensor, count: int, p: LoraLego, context: Context) -> Clusters:
    """The tightest clusters of all restarts; the first of equally tight ones."""
    signed = p.compat == "paper"
    best, best_explained = None, 0.0
    for restart in range(p.restarts):
        start_K = seeds(gram_NN, count, _generator(context, "k-means", restart), signed=signed)
        found = k_means(gram_NN, start_K, p.iterations, signed=signed)
        explained = _explained(gram_NN, found)
        # A margin, so that the last bit of a sum does not choose between equal clusterings.
        if best is None or explained > best_explained * (1 + SAME_POINT):
            best, best_explained = found, explained
    assert best is not None
    return best


def _explained(gram_NN: Tensor, found: Clusters) -> float:
    """sum_k n_k |c_k|^2, which is 2 N less the sum of squared distances."""
    means_NK = found.means()
    n_K = torch.bincount(found.labels, minlength=found.count)
    return float(((means_NK * (gram_NN @ means_NK)).sum(dim=0) * n_K).sum())


def seeds(gram_NN: Tensor, count: int, generator: torch.Generator, *, signed: bool) -> Tensor:
    """Indices of the first centres, k-means++: each drawn with probability proportional to its squared distance.

    Fewer than `count` where there are fewer different points.
    """
    n_pairs = len(gram_NN)
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    chosen = [int(draws[0] * n_pairs)]
    nearest_N = _distances(gram_NN[:, chosen[0]], signed=signed)
    for draw in draws[1:]:
        cumulative_N = nearest_N.cumsum(0)
        if float(cumulative_N[-1]) == 0.0:
            break
        place = torch.searchsorted(cumulative_N, draw * cumulative_N[-1], right=True)
        chosen.append(min(int(place), n_pairs - 1))
        nearest_N = torch.minimum(nearest_N, _distances(gram_NN[:, chosen[-1]], signed=signed))
    return torch.tensor(chosen, device=gram_NN.device)


def _distances(product_N: Tensor, *, signed: bool) -> Tensor:
    """|x -+ c|^2 of two pairs with inner product `product_N`, 0 where it is rounding."""
    squared_N = 4 - 2 * (product_N.abs() if signed else product_N)
    return torch.nn.functional.threshold(squared_N, SAME_POINT, 0.0)


def k_means(gram_NN: Tensor, start_K: Tensor, iterations: int, *, signed: bool) -> Clusters:
    """Lloyd's steps until no pair moves; a cluster that loses all pairs keeps its centre.

    Args:
        gram_NN: inner products of the points, float64.
        start_K: indices of the first centres.
        iterations: steps at most.
        signed: whether x and -x are the same point; a mean is then one of aligned points.
    """
    n_pairs, count = len(gram_NN), len(start_K)
    centre_NK = torch.zeros(n_pairs, count, dtype=gram_NN.dtype, device=gram_NN.device)
    centre_NK[start_K, torch.arange(count, device=gram_NN.device)] = 1.0
    found = None
    for _ in range(iterations):
        product_NK = gram_NN @ centre_NK
        squared_K = (centre_NK * product_NK).sum(dim=0)
        label_N = (squared_K - 2 * (product_NK.abs() if signed else product_NK)).argmin(dim=1)
        own_N = product_NK.gather(1, label_N[:, None])[:, 0]
        sign_N = torch.where(own_N < 0, -1.0, 1.0).to(gram_NN.dtype) if signed else torch.ones_like(own_N)
        if found is not None and torch.equal(label_N, found.labels) and torch.equal(sign_N, found.signs):
            break
        found = Clusters(label_N, sign_N, count)
        means_NK = found.means()
        centre_NK = torch.where((means_NK != 0).any(dim=0), means_NK, centre_NK)
    assert found is not None
    return found


def assemble(pool: Pool, found: Clusters, p: LoraLego, dtype: torch.dtype) -> LowRankDelta:
    """The rescaled centroids as factors."""
    means_NK = found.means()
    means_NK = means_NK[:, (means_NK != 0).any(dim=0)]
    b_KO, a_KI = means_NK.T @ pool.B_NO, means_NK.T @ pool.A_NI
    # Both sides are rescaled, so the update goes with the square.
    scale_K = torch.ones_like(b_KO[:, 0])
    if p.parameter_reweighting:
        members_K = means_NK.abs().T @ _largest(pool.B_NO, pool.A_NI)
        centroid_K = _largest(b_KO, a_KI)
        ratio_K = members_K / centroid_K.masked_fill(centroid_K == 0, 1.0)
        scale_K = scale_K * ratio_K.square()
    if p.output_reweighting:
        scale_K = scale_K * math.sqrt(pool.largest / len(scale_K))
    return LowRankDelta(b_KO.T.to(dtype).contiguous(), (a_KI * scale_K[:, None]).to(dtype))


def _largest(b_NO: Tensor, a_NI: Tensor) -> Tensor:
    return torch.maximum(b_NO.abs().amax(dim=1), a_NI.abs().amax(dim=1))
