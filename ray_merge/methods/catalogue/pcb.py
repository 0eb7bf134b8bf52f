"""Declaration of PCB-Merging.

The authors' function keeps 0.1 of the scores by default (their vision scripts 0.05, with a weight of 1.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_merge.algebra.grid import chunk_rows
from ray_merge.methods import cost, memory
from ray_merge.methods.catalogue.common import COMPAT, LAMBDA, SHARE, SPACE, WEIGHT
from ray_merge.methods.declare import Method, choice, number

SCORED = "share of entries kept, highest scores first"
EACH_WEIGHT = "each weight for itself; the authors normalise and rank scores over the whole model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pcb:
    """pcb."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.1, SCORED, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor",), EACH_WEIGHT)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "authors"), COMPAT)


SCORE_COPIES = 16
"""Chunks that scores take beyond an election's: every adapter's, their products, and one pass's exponentials."""


def sizes(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> memory.SiteBytes:
    """An election's bytes and those of the scores."""
    plain = memory.entrywise(space, shape, ranks)
    chunk = memory.FLOAT64 * min(shape[0], chunk_rows(shape[1])) * shape[1]
    return memory.SiteBytes(plain.shared, plain.held, plain.passing + SCORE_COPIES * chunk)


METHODS: tuple[Method, ...] = (
    Method(
        name="pcb",
        family="pcb",
        summary="score entries by their size and their agreement with the others, keep the best, average by score",
        reference="PCB-Merging, arXiv 2410.02396",
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=Pcb,
        work=cost.entries(cost.SCORED, cost.SCORED_PAIR),
        sizes=sizes,
        kernel="ray_merge.methods.pcb:pcb",
    ),
)
