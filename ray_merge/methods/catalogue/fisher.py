"""Declaration of Fisher merging.

fusion_bench and the code that EMR-Merging and OSRM compare with divide each adapter's Fisher information by its norm
and add 1e-6 to every entry. Of a mean over examples that is often more than the entries themselves, and the result
then the plain mean, so here epsilon is a share of the mean entry unless `floor: absolute` is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_merge.methods import cost, memory, rules
from ray_merge.methods.catalogue.common import AVERAGED, COUNTED, LAMBDA, WITHOUT_MOMENTS
from ray_merge.methods.declare import Interval, Method, choice, flag, number

LABELS = (
    "of which labels the gradients are: all by their probability, one drawn by it, or the one in the data"
)
FLOOR = "what epsilon is a multiple of: relative, the mean Fisher entry of all adapters at the weight; absolute, 1"
CHUNK_COPIES = 3
"""Chunks in units of what a plain sum of rows has: Fisher rows, in float64 too, and both running sums come on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fisher:
    """fisher."""

    weight: tuple[float, ...] = number(1.0, COUNTED, Interval(0.0), per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    labels: str = choice("expected", ("expected", "sampled", "empirical"), LABELS)
    normalize: bool = flag(True, "divide each adapter's Fisher information by its norm over all its weights")
    epsilon: float = number(1e-6, "is added to every Fisher entry", Interval(1e-12))
    floor: str = choice("relative", ("relative", "absolute"), FLOOR)
    without_moments: str = choice("refuse", AVERAGED, WITHOUT_MOMENTS)


def sizes(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> memory.SiteBytes:
    """`Method.sizes`: chunks of rows of one adapter after another; the Fisher information stays in its file."""
    plain = memory.factors(space, shape, ranks)
    return memory.SiteBytes(2 * plain.shared, 0, CHUNK_COPIES * plain.passing)


METHODS: tuple[Method, ...] = (
    Method(
        name="fisher",
        family="fisher",
        summary="lambda * sum_i weight_i F_i * delta_i / sum_i weight_i F_i entry by entry, F_i the Fisher diagonal",
        reference="Fisher merging, arXiv 2111.09832",
        parameters=Fisher,
        needs=("moments",),
        statistics="fisher",
        rule=rules.some_weight,
        sizes=sizes,
        work=cost.entries(cost.WEIGHED),
        kernel="ray_merge.methods.fisher:fisher",
    ),
)
