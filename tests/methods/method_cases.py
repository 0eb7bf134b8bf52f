"""Seeded factors, and dense float64 references of the methods, written from the formulas and not from our code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ray_merge.algebra.moments import Moments
from ray_merge.methods.given_statistics import FisherTensor
from ray_merge.spec import Factor


def random_factors(shape, ranks: Sequence[int], seed: int = 0, dtype=torch.float64) -> list[Factor]:
    """Factors of rank ranks[i], with different scales."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [
        Factor(normal(shape[0], rank).to(dtype), normal(rank, shape[1]).to(dtype), 0.5 + index)
        for index, rank in enumerate(ranks)
    ]


def random_statistics(kind: str, factors: Sequence[Factor]) -> dict[str, list[Any]]:
    """What `merge_site` takes as inputs for methods that need the statistics called `kind`."""
    generator = torch.Generator().manual_seed(7)
    shape = (factors[0].B.shape[0], factors[0].A.shape[1])

    def rows(count: int) -> Tensor:
        return torch.randn(count, shape[1], generator=generator, dtype=torch.float64) + 0.3

    if kind == "gram":
        samples = [rows(2 * shape[1]) for _ in factors]
        return {"moments": [Moments(X.T @ X, X.mean(0), len(X)) for X in samples]}
    if kind == "fisher":
        return {"moments": [FisherTensor(rows(shape[0]).square()) for _ in factors]}
    return {}


def deltas(factors: Sequence[Factor]) -> Tensor:
    """(T, O, I), float64."""
    return torch.stack([factor.scale * factor.B.double() @ factor.A.double() for factor in factors])


def weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    """Each of T tensors times its weight."""
    return values * torch.tensor(weights, dtype=values.dtype).view(-1, *[1] * (values.dim() - 1))


def trim_dense(values: Tensor, density: Sequence[float]) -> Tensor:
    """The top floor(density * n) magnitudes of each of T tensors."""
    out = torch.zeros_like(values)
    for index, share in enumerate(density):
        flat = values[index].flatten()
        keep = flat.abs().argsort(descending=True)[: max(1, int(share * flat.numel()))]
        out[index].view(-1)[keep] = flat[keep]
    return out


def elect_dense(values: Tensor) -> Tensor:
    """Sign of the sum of values, then the mean of the entries with that sign; 0 where the sum is 0."""
    agree = (values.sign() == values.sum(0).sign()) & (values != 0)
    return (values * agree).sum(0) / agree.sum(0).clamp(min=1)


def without_rounding(coordinates: Tensor) -> Tensor:
    """Entries that are zero but for float64 rounding, as zero: a sign vote would count them."""
    return torch.where(coordinates.abs() > 1e-12 * coordinates.abs().max(), coordinates, 0.0)


def knots_dense(values: Tensor) -> tuple[Tensor, Tensor]:
    """U and the T blocks S V_i of the SVD of the stacked dense deltas."""
    U, s, Vt = torch.linalg.svd(torch.cat(list(values), dim=1), full_matrices=False)
    keep = s > 1e-5
    blocks = (s[keep, None] * Vt[keep]).split(values.shape[2], dim=1)
    return U[:, keep], without_rounding(torch.stack(blocks))


def core_dense(factors: Sequence[Factor]) -> tuple[Tensor, Tensor, Tensor]:
    """U_B, the T matrices M_i, and V_A^T."""
    U = torch.linalg.svd(torch.cat([factor.B for factor in factors], dim=1), full_matrices=False).U
    Vt = torch.linalg.svd(torch.cat([factor.A for factor in factors], dim=0), full_matrices=False).Vh
    return U, without_rounding(U.T @ deltas(factors) @ Vt.T), Vt


def relative(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))
