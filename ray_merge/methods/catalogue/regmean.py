"""Declaration of RegMean.

The paper (arXiv 2212.09849) multiplies what is off the diagonal of a Gram matrix by 0.9 in most experiments; the
authors' configurations have 0.1 for RoBERTa and DeBERTa, fusion_bench 0.1, 0.6 (GPT-2) and 0.95 (CLIP), and the
code that EMR-Merging and OSRM compare with 1.0.

The ridge of none of them; 1e-6 of the mean diagonal is below what fewer tokens than inputs, dead inputs or the float32
rounding of activations leave undefined, and keeps the condition number where float64 gives float32's seven digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_merge.methods import cost, memory, rules
from ray_merge.methods.catalogue.common import AVERAGED, COUNTED, LAMBDA, WITHOUT_MOMENTS
from ray_merge.methods.declare import Interval, Method, choice, number

GRAM_COPIES = 3
"""(I, I) float64 matrices at once: a Gram matrix, the triangle that it was unpacked from, and the sum; later the sum
and its Cholesky factor."""

THIN_COPIES = 4
"""Of the factors on the side of the inputs, in float64: products with a Gram matrix, their sum, its solution."""

DENSE_COPIES = 3
"""Of (O, I) in float64 where an adapter is DoRA: the sum of products, the copy that is solved, the solution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegMean:
    """regmean."""

    weight: tuple[float, ...] = number(1.0, COUNTED, Interval(0.0), per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    off_diagonal: float = number(
        0.9,
        "factor of what is off the diagonal of each adapter's Gram matrix; 1 is the exact regression",
        Interval(0.0, 1.0),
    )
    ridge: float = number(
        1e-6,
        "adds this share of the mean diagonal to every diagonal, so that inputs that no data show are averaged",
        Interval(0.0),
    )
    without_moments: str = choice("refuse", AVERAGED, WITHOUT_MOMENTS)


def sizes(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> memory.SiteBytes:
    """`Method.sizes`: Gram matrices one after another, and a whole (O, I) in case an adapter is DoRA.

    I is the number of inputs, for HF Conv1D too, which is stored (I, O) (plan/kinds.py).
    """
    total, plain = sum(ranks), memory.factors(space, shape, ranks)
    square = memory.FLOAT64 * GRAM_COPIES * shape[1] ** 2
    thin = memory.FLOAT64 * THIN_COPIES * total * shape[1]
    dense = memory.FLOAT64 * DENSE_COPIES * shape[0] * shape[1]
    held = max(plain.held, memory.FLOAT32 * shape[0] * shape[1])
    return memory.SiteBytes(plain.shared, held, plain.passing + square + max(thin, dense))


METHODS: tuple[Method, ...] = (
    Method(
        name="regmean",
        family="regmean",
        summary="argmin_delta sum_i weight_i E|(delta - delta_i) x_i|^2 over inputs x_i of adapter i's own data",
        reference="RegMean, arXiv 2212.09849",
        low_rank_spaces=("dense",),
        parameters=RegMean,
        needs=("moments",),
        statistics="gram",
        rule=rules.some_weight,
        sizes=sizes,
        work=cost.regressed,
        kernel="ray_merge.methods.regmean:regmean",
    ),
)
