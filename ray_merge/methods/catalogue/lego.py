"""Declaration of LoRA-LEGO (arXiv 2409.16167). TARA's code starts k-means once, at random, for 10 iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_merge.methods import cost, memory
from ray_merge.methods.catalogue.common import AT_LEAST_ONE, COMPAT, LAMBDA, WEIGHT
from ray_merge.methods.declare import Interval, Method, choice, flag, integer, number

POOL_COPIES = 3
"""All pairs in float64, the copy that sorts them, and magnitudes or centroids."""

SQUARE_COPIES = 8
"""(N, N) and (N, K) matrices of one k-means run over N pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraLego:
    """lora_lego."""

    weight: tuple[float, ...] = number(1.0, WEIGHT + "; 0 leaves it out", per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    rank: int = integer(
        "clusters, the rank of the result; 0 is the largest rank of the adapters", Interval(0.0), 0
    )
    parameter_reweighting: bool = flag(
        True, "rescale each centroid to the mean of its members' largest magnitudes"
    )
    output_reweighting: bool = flag(
        True, "multiply by sqrt(r / clusters), r the largest rank of the adapters"
    )
    restarts: int = integer("k-means runs from different seeds; the tightest clusters win", AT_LEAST_ONE, 4)
    iterations: int = integer("steps of one k-means run at most", AT_LEAST_ONE, 100)
    compat: str = choice(
        "paper", ("paper", "tara"), COMPAT + ": in tara a pair (b, a) and the same (-b, -a) are far apart"
    )


def sizes(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> memory.SiteBytes:
    """`Method.sizes`: the pool of pairs in float64, their Gram matrix, and the result's factors."""
    total, plain = sum(ranks), memory.factors(space, shape, ranks)
    made = memory.FLOAT64 * (POOL_COPIES * total * sum(shape) + SQUARE_COPIES * total * total)
    return memory.SiteBytes(plain.shared, plain.held, plain.passing + made)


METHODS: tuple[Method, ...] = (
    Method(
        name="lora_lego",
        family="lora_lego",
        summary="cluster the rank-one pairs (b, a) of all adapters and sum the rescaled centroids",
        reference="LoRA-LEGO, arXiv 2409.16167",
        low_rank_spaces=("dense",),
        factors_only=True,
        parameters=LoraLego,
        sizes=sizes,
        work=cost.clustered,
        kernel="ray_merge.methods.lego:lora_lego",
    ),
)
