"""Declaration of CART. Default: 0.04 of the singular values, as in the Core Space authors' code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import MethodError
from ray_merge.methods import cost
from ray_merge.methods.catalogue.common import AT_LEAST_ONE, LAMBDA, SHARE, WEIGHT
from ray_merge.methods.catalogue.tsv import optional, sizes
from ray_merge.methods.declare import Method, choice, number

CART = "ray_merge.methods.cart"
CART_PAPER = "CART, arXiv 2412.12153"
PUBLISHED_SHARE = 0.04


@dataclass(frozen=True, kw_only=True, slots=True)
class Cart:
    """cart."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    centred: float = number(
        1.0,
        "factor of the centred, rank-reduced updates beside their mean (the paper's lambda)",
        per_site=True,
    )
    share: float | None = optional(
        "number", "singular values kept of each centred update, as a share of `space`; default 0.04", SHARE
    )
    rank: int | None = optional("integer", "singular values kept of each, instead of a share", AT_LEAST_ONE)
    space: str = choice(
        "dense",
        ("dense", "core"),
        "what share is of: min(O, I) of the dense delta, or min(O, I, R) in Core Space",
    )


def rule(values: dict[str, Any]) -> None:
    """Fill `share` where neither it nor `rank` is given; refuse both."""
    if values["rank"] is None and values["share"] is None:
        values["share"] = PUBLISHED_SHARE
    if None not in (values["rank"], values["share"]):
        raise MethodError(
            f"share {values['share']:g} and rank {values['rank']} both say how many singular values are kept; "
            "remove one of them"
        )


def kept(share: float | None, rank: int | None, n_all: int) -> int:
    """How many of `n_all` singular values are kept; a share is rounded up, as published."""
    if rank is not None:
        return rank
    assert share is not None, "the rule fills it"
    return math.ceil(share * n_all)


METHODS: tuple[Method, ...] = (
    Method(
        name="cart",
        factors_only=True,
        family="cart",
        summary="lambda * (m + centred * sum_i SVD_k(weight_i * delta_i - m)), m the mean of weight_i * delta_i",
        reference=CART_PAPER,
        spaces=("dense", "core"),
        low_rank_spaces=("dense", "core"),
        parameters=Cart,
        rule=rule,
        sizes=sizes,
        work=cost.spectral_each,
        kernel=f"{CART}:cart",
    ),
)
