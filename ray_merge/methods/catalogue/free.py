"""Declaration of FREE-Merging's backbone, FR-Merging (arXiv 2411.16815).

Defaults: TARA's code removes a tenth of the shorter side; the authors' ViT settings have filter_ratio 0.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_merge.algebra.grid import chunk_rows
from ray_merge.errors import MethodError
from ray_merge.methods import cost, memory
from ray_merge.methods.catalogue.common import COMPAT, LAMBDA, WEIGHT
from ray_merge.methods.declare import Interval, Method, choice, number

CUTOFF, FILTER_RATIO = 0.1, 0.7

BLOCK_ENTRIES = 2**18
"""Frequencies (or pairs of row and frequency) that are worked on at once."""

HELD_ENTRIES = 2**21
"""Touched frequencies kept for all chunks of rows; more of them are made anew for every chunk."""

COMPLEX64, COMPLEX128 = 8, 16

CHUNK_COPIES = 6
"""Of one chunk, in float32: the sum's rows, the rows' spectrum and the product added to it, and the inverse."""

BLOCK_BYTES = BLOCK_ENTRIES * 64
"""Squared distances in int64, masks, phases and the spectrum of one block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Free:
    """free."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    cutoff: float = number(
        CUTOFF, "frequencies nearer to 0 than this share of the shorter side are removed", Interval(0.0, 1.0)
    )
    filter_ratio: float = number(
        FILTER_RATIO,
        "compat authors only: frequencies within this share of the shorter side from the highest are kept",
        Interval(0.0),
    )
    compat: str = choice(
        "paper",
        ("paper", "authors", "tara"),
        COMPAT + ": neither code shifts the spectrum, so that tara removes the highest frequencies",
    )


def rule(values: dict[str, Any]) -> None:
    """Refuse the parameter that the chosen `compat` does not read."""
    name, default = ("cutoff", CUTOFF) if values["compat"] == "authors" else ("filter_ratio", FILTER_RATIO)
    if values[name] != default:
        raise MethodError(
            f"compat {values['compat']} does not read {name}, got {values[name]:g}; remove it or change compat"
        )


def sizes(space: str, shape: tuple[int, int], ranks: Sequence[int]) -> memory.SiteBytes:
    """`Method.sizes`: factors, their transforms, the touched frequencies if few, a chunk of rows and a block.

    Never the whole spectrum of a large site, whatever the parameters.
    """
    total, plain = sum(ranks), memory.factors(space, shape, ranks)
    half = shape[1] // 2 + 1
    spectra = COMPLEX64 * (total * (shape[0] + half) + min(HELD_ENTRIES, shape[0] * half))
    while_made = (COMPLEX128 + memory.FLOAT64) * total * max(shape[0], half)
    chunk = memory.FLOAT32 * min(shape[0], chunk_rows(shape[1])) * shape[1]
    passing = max(while_made, CHUNK_COPIES * chunk + BLOCK_BYTES)
    return memory.SiteBytes(plain.shared, plain.held + spectra, passing)


METHODS: tuple[Method, ...] = (
    Method(
        name="free",
        family="free",
        summary="the weighted sum of deltas without its low frequencies (2-D Fourier transform)",
        reference="FREE-Merging (FR-Merging, without its experts), arXiv 2411.16815",
        factors_only=True,
        parameters=Free,
        rule=rule,
        sizes=sizes,
        work=cost.filtered,
        kernel="ray_merge.methods.free:free",
    ),
)
