"""Declaration of RobustMerge (arXiv 2502.17159).

Defaults: both published codes fuse with 2. TARA's code keeps 0.8 of a factor's entries ("mask_ratio 0.8"); the
authors' script keeps 0.2 ("mask_ratio 0.2").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_merge.methods import cost, memory
from ray_merge.methods.catalogue.common import COMPAT, LAMBDA, SHARE, WEIGHT
from ray_merge.methods.declare import Method, choice, number

PRUNE_COPIES = 9
"""Of the largest factor, in its dtype: pruned entries, magnitudes, and a pass of the radix selection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RobustMerge:
    """robustmerge."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(
        0.8, "share of entries kept in A and in B, largest magnitudes first", SHARE, per_adapter=True
    )
    lambda_: float = number(2.0, LAMBDA, key="lambda", per_site=True)
    compat: str = choice(
        "paper",
        ("paper", "tara", "authors"),
        COMPAT
        + ": authors merges A and B apart, cross terms included, and takes equal ranks (their lambda is 4)",
    )


def sizes(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> memory.SiteBytes:
    """`Method.sizes`: pruned factors before and after they are stacked, and the selection of a threshold."""
    plain = memory.factors(space, shape, ranks)
    largest = max(ranks, default=0) * max(shape)
    made = plain.held + PRUNE_COPIES * memory.FLOAT32 * largest
    return memory.SiteBytes(plain.shared, plain.held, plain.passing + made)


METHODS: tuple[Method, ...] = (
    Method(
        name="robustmerge",
        family="robustmerge",
        summary="prune A and B, rescale each rank by what A lost, normalise the scales over adapters, sum",
        reference="RobustMerge, arXiv 2502.17159",
        low_rank_spaces=("dense",),
        factors_only=True,
        parameters=RobustMerge,
        sizes=sizes,
        work=cost.pruned,
        equal_ranks=("authors",),
        kernel="ray_merge.methods.robust:robustmerge",
    ),
)
