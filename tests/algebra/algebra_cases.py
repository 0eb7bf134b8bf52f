"""Seeded factors for tests of the algebra."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ray_merge.spec import Factor

SHAPES_AND_RANKS = [
    ((24, 17), (3, 5, 2)),
    ((17, 24), (0, 4, 0)),
    ((6, 40), (4, 4, 4)),
    ((40, 6), (4, 4, 4)),
    ((5, 4), (7, 1, 3)),
    ((1, 1), (1, 1, 1)),
    ((8, 9), (0, 0, 0)),
]
"""Mixed ranks, untouched adapters, R > O, R > I, R_i > I, nothing at all."""


def random_factors(shape, ranks: Sequence[int], seed: int = 0, dtype=torch.float64) -> list[Factor]:
    """Factors of rank ranks[i], with different scales."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [
        Factor(normal(shape[0], rank).to(dtype), normal(rank, shape[1]).to(dtype), 0.5 + index)
        for index, rank in enumerate(ranks)
    ]


def delta_of(factor: Factor) -> torch.Tensor:
    """Scale * B @ A in float64."""
    return factor.scale * factor.B.double() @ factor.A.double()
