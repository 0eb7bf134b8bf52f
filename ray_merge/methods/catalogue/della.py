"""Declarations of DELLA.

Defaults are the authors' example: drop 0.3 with a window of 0.14, here density 0.7 and epsilon 0.07 (mergekit's
`epsilon` is half the window).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import MethodError
from ray_merge.methods import rules
from ray_merge.methods.catalogue.common import (
    COMPAT,
    ENTRYWISE,
    LAMBDA,
    NORMALIZE_MERGEKIT,
    SHARE,
    SPACE,
    WEIGHT,
)
from ray_merge.methods.declare import Interval, Method, choice, flag, number

DELLA = "ray_merge.methods.della"
DELLA_PAPER = "DELLA-Merging, arXiv 2406.11617"

KEPT_BY_RANK = "mean probability of keeping an entry; what is kept is divided by its own probability"
EPSILON = "the smallest entry of a row is kept with probability density - epsilon, the largest with density + epsilon"


@dataclass(frozen=True, kw_only=True, slots=True)
class Della:
    """della."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.7, KEPT_BY_RANK, SHARE, per_adapter=True)
    epsilon: tuple[float, ...] = number(0.07, EPSILON, Interval(0.0, 0.5), per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor",), ENTRYWISE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "mergekit"), COMPAT)
    normalize: bool | None = flag(None, NORMALIZE_MERGEKIT + "; default true")


@dataclass(frozen=True, kw_only=True, slots=True)
class DellaLinear:
    """della_linear."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.7, KEPT_BY_RANK, SHARE, per_adapter=True)
    epsilon: tuple[float, ...] = number(0.07, EPSILON, Interval(0.0, 0.5), per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor",), ENTRYWISE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "mergekit"), COMPAT)
    normalize: bool | None = flag(
        None, "compat mergekit only: divide by the sum of the weights; default false"
    )


def windows(values: Mapping[str, Any]) -> None:
    """Refuse probabilities of keeping an entry that are not in (0, 1]."""
    for density, epsilon in _together(values["density"], values["epsilon"]):
        for name, share in density.items():
            low, high = share - epsilon[name], share + epsilon[name]
            if share < 1 and not (low > 0 and high <= 1):
                raise MethodError(
                    f"density {share:g} and epsilon {epsilon[name]:g} for {name} give probabilities from "
                    f"{low:g} to {high:g}, which must lie in (0, 1]; "
                    f"epsilon must be below {share:g} and at most {1 - share:g}"
                )


def della_rule(values: dict[str, Any]) -> None:
    """Rules of della."""
    rules.ties(values)
    windows(values)


def linear_rule(values: dict[str, Any]) -> None:
    """Rules of della_linear."""
    rules.dare_linear(values)
    windows(values)


def _together(density: Any, epsilon: Any) -> Iterator[tuple[Mapping[str, float], Mapping[str, float]]]:
    """Every two mappings that may hold at one site; which filters meet is unknown unless they are the same."""
    first, second = ([{"value": item}] if isinstance(item, Mapping) else item for item in (density, epsilon))
    filters = [[item.get("filter") for item in items] for items in (first, second)]
    same = isinstance(density, list) and isinstance(epsilon, list) and filters[0] == filters[1]
    for place, one in enumerate(first):
        for other in second[place : place + 1] if same else second:
            yield one["value"], other["value"]


METHODS: tuple[Method, ...] = (
    Method(
        name="della",
        family="della",
        summary="drop entries at random, small ones more often, rescale, elect a sign per entry, average",
        reference=DELLA_PAPER,
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=Della,
        rule=della_rule,
        kernel=f"{DELLA}:della",
    ),
    Method(
        name="della_linear",
        family="della",
        summary="drop entries at random, small ones more often, rescale, sum",
        reference=DELLA_PAPER,
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=DellaLinear,
        rule=linear_rule,
        kernel=f"{DELLA}:della_linear",
    ),
)
