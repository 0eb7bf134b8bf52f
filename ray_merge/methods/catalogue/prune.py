"""Declaration of magnitude_prune. PEFT has no default density; 0.2 is what TIES keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_merge.methods import rules
from ray_merge.methods.catalogue.common import KEPT, LAMBDA, SCOPE, SHARE, SPACE, WEIGHT
from ray_merge.methods.catalogue.ties import kept_entries
from ray_merge.methods.declare import Method, choice, number


@dataclass(frozen=True, kw_only=True, slots=True)
class MagnitudePrune:
    """magnitude_prune."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.2, KEPT, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor", "model"), SCOPE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)


def counts(values: Mapping[str, Any], adapter: str, n_entries: int) -> tuple[int, ...]:
    """`Method.counts`: the magnitude that the kept entries end at."""
    return (kept_entries(n_entries, values["density"][adapter], "paper"),)


METHODS: tuple[Method, ...] = (
    Method(
        name="magnitude_prune",
        family="prune",
        summary="trim each delta, sum; nothing is rescaled",
        reference="PEFT add_weighted_adapter(magnitude_prune_svd), without its SVD",
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=MagnitudePrune,
        rule=rules.one_density,
        counts=counts,
        kernel="ray_merge.methods.prune:magnitude_prune",
    ),
)
