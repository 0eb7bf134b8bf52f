"""Declaration of WUDI-Merging. The paper (arXiv 2503.08099) has no scale: weight and lambda are 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_merge.methods import cost, memory
from ray_merge.methods.catalogue.common import COMPAT, LAMBDA, WEIGHT
from ray_merge.methods.declare import Interval, Method, choice, number

SOLVE_COPIES = 3
"""Factors in float64, and what the QR of the stacked A and the solution hold beside them."""

SQUARE_COPIES = 10
"""(2 R, R) matrices at most: the system with its ridge, and the SVD of its pseudo-inverse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wudi:
    """wudi."""

    weight: tuple[float, ...] = number(
        1.0, WEIGHT + ", before interference is measured; 0 leaves it out", per_adapter=True
    )
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    ridge: float = number(
        0.0,
        "adds ridge * |tau - sum delta_i|^2; try 0.01 where adapters have nearly the same A",
        Interval(0.0),
    )
    compat: str = choice(
        "paper",
        ("paper", "authors"),
        COMPAT + ": authors divides by the norm of an update instead of its square, as their ViT code does",
    )


def sizes(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> memory.SiteBytes:
    """`Method.sizes`: the result's factors, and while it is made QR and pseudo-inverse in float64."""
    total, plain = sum(ranks), memory.factors(space, shape, ranks)
    made = memory.FLOAT64 * (SOLVE_COPIES * total * sum(shape) + SQUARE_COPIES * total * total)
    return memory.SiteBytes(plain.shared, plain.held, plain.passing + made)


METHODS: tuple[Method, ...] = (
    Method(
        name="wudi",
        family="wudi",
        summary="argmin_tau sum_i |(tau - delta_i) delta_i^T|^2 / |delta_i|^2, in closed form",
        reference="WUDI-Merging, arXiv 2503.08099",
        low_rank_spaces=("dense",),
        factors_only=True,
        parameters=Wudi,
        sizes=sizes,
        work=cost.solved,
        kernel="ray_merge.methods.wudi:wudi",
    ),
)
