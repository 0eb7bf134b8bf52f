"""Declaration of TSV-Merge, and what the spectral families share. Scale 1 by default (arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_merge.methods import cost, memory
from ray_merge.methods.catalogue.common import AT_LEAST_ONE, LAMBDA, WEIGHT
from ray_merge.methods.declare import Interval, Kind, Method, choice, number

TSV = "ray_merge.methods.tsv"
TSV_PAPER = "TSV-Merge, arXiv 2412.00081"

SMALL_COPIES = 14
"""(R, R) matrices of float64 alive together, as measured: core matrices, SVDs with their workspace, polar factors."""


def optional(kind: Kind, text: str, interval: Interval) -> Any:
    """A dataclass field that holds a number, or None where the recipe is silent."""
    return field(metadata={"kind": kind, "help": text, "interval": interval, "default": None})


def sizes(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> memory.SiteBytes:
    """`Method.sizes` of the spectral methods: Core Space bases, then (R, R) problems in float64, in every space."""
    total = sum(ranks)
    thin, rank = total * sum(shape), min(total, *shape)
    plain = memory.factors(space, shape, ranks)
    bases = memory.FLOAT64 * (thin + 2 * total * total)
    while_made = memory.FLOAT64 * ((memory.QR_COPIES - 1) * thin + SMALL_COPIES * total * total)
    return memory.SiteBytes(
        2 * plain.shared + bases, memory.FLOAT32 * rank * sum(shape), plain.passing + while_made
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TsvM:
    """tsv_m."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    rank: int | None = optional(
        "integer", "singular triplets kept of each adapter; default: all that its update has", AT_LEAST_ONE
    )
    space: str = choice("dense", ("dense", "core"), "where triplets are taken; both give the same result")


METHODS: tuple[Method, ...] = (
    Method(
        name="tsv_m",
        factors_only=True,
        family="tsv",
        summary="lambda * polar([U_1 .. U_T]) diag(S_1 .. S_T) polar([V_1 .. V_T])^T, U_i S_i V_i^T = weight_i delta_i",
        reference=TSV_PAPER,
        spaces=("dense", "core"),
        low_rank_spaces=("dense", "core"),
        parameters=TsvM,
        sizes=sizes,
        work=cost.spectral,
        kernel=f"{TSV}:tsv_m",
    ),
)
