"""Declarations of DELLA.

Defaults are the authors' example: drop 0.3 with a window of 0.14, here density 0.7 and epsilon 0.07 (mergekit's
`epsilon` is half the window).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import MethodError
from ray_merge.methods import cost, rules
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
from ray_merge.methods.gradient import Knot, at_depth, run_of

DELLA = "ray_merge.methods.della"
DELLA_PAPER = "DELLA-Merging, arXiv 2406.11617"

KEPT_BY_RANK = "mean probability of keeping an entry; what is kept is divided by its own probability"
EPSILON = "the smallest entry of a row is kept with probability density - epsilon, the largest with density + epsilon"

ROUNDING = 1e-12
"""How far above 1 a probability may come out that is 1 between two knots."""


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
    """Refuse probabilities of keeping an entry that are not in (0, 1] at every depth.

    Between two knots of either both change in proportion to depth, so that what holds at both ends holds between.
    """
    for densities, epsilons in _together(values["density"], values["epsilon"]):
        depths = sorted({depth for depth, _ in (*densities, *epsilons)})
        shares = [at_depth(densities, depth) for depth in depths]
        for place, depth in enumerate(depths):
            # Nothing is drawn at density 1, but a density that comes near to it has a limit there.
            beside = shares[max(0, place - 1) : place + 2]
            for name, width in at_depth(epsilons, depth).items():
                share = shares[place][name]
                low, high = share - width, share + width
                drawn = any(near[name] < 1 for near in beside)
                if drawn and not (low > 0 and high <= 1 + ROUNDING):
                    where = f" near depth {depth:g}" if len(depths) > 1 else ""
                    raise MethodError(
                        f"density {share:g} and epsilon {width:g} for {name}{where} give probabilities from "
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


def _together(density: Any, epsilon: Any) -> Iterator[tuple[list[Knot], list[Knot]]]:
    """Every two runs of knots that may hold at one site; one knot is one value at every depth.

    Of each list a site takes the first filter that it matches: with a filter that both have, what stands behind it in
    the other list never holds. Any other two filters may match the same site.
    """
    first, second = _runs(density), _runs(epsilon)
    for place, (pattern, one) in enumerate(first):
        before = [earlier for earlier, _ in first[:place]]
        for other_pattern, other in second:
            if other_pattern not in before:
                yield one, other
            if other_pattern == pattern:
                break


def _runs(value: Any) -> list[tuple[str | None, list[Knot]]]:
    items: list[dict[str, Any]] = [{"value": value}] if isinstance(value, Mapping) else value
    runs: list[tuple[str | None, list[Knot]]] = []
    place = 0
    while place < len(items):
        knots = run_of(items, place) or [(0.0, items[place]["value"])]
        runs.append((items[place].get("filter"), knots))
        place += len(knots)
    return runs


METHODS: tuple[Method, ...] = (
    Method(
        name="della",
        family="della",
        summary="drop entries at random, small ones more often, rescale, elect a sign per entry, average",
        reference=DELLA_PAPER,
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=Della,
        work=cost.entries(cost.RANKED),
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
        work=cost.entries(cost.RANKED),
        rule=linear_rule,
        kernel=f"{DELLA}:della_linear",
    ),
)
