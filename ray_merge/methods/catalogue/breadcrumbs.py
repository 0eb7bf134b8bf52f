"""Declarations of Model Breadcrumbs.

Words and defaults are mergekit's: `density` is the share that is left, `gamma` the share of outliers that goes
(the paper's beta is 1 - density - gamma). density 0.9 and gamma 0.01 are what mergekit's manual starts with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import MethodError
from ray_merge.methods import cost, rules
from ray_merge.methods.catalogue.common import (
    COMPAT,
    LAMBDA,
    NORMALIZE_MERGEKIT,
    SCOPE,
    SHARE,
    SPACE,
    WEIGHT,
)
from ray_merge.methods.catalogue.ties import TIES_PAPER, kept_entries
from ray_merge.methods.declare import Interval, Method, choice, flag, number

BREADCRUMBS = "ray_merge.methods.breadcrumbs"
BREADCRUMBS_PAPER = "Model Breadcrumbs, arXiv 2312.06795"

UNIT = Interval(0.0, 1.0)
KEPT_BELOW = "share of entries kept, largest magnitudes first after the outliers"
OUTLIERS = "share of entries dropped for having the largest magnitudes, at most what `density` leaves over"


@dataclass(frozen=True, kw_only=True, slots=True)
class Breadcrumbs:
    """breadcrumbs."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.9, KEPT_BELOW, SHARE, per_adapter=True)
    gamma: tuple[float, ...] = number(0.01, OUTLIERS, UNIT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    normalize: bool = flag(False, "divide by the sum of the weights")
    scope: str = choice("tensor", ("tensor", "model"), SCOPE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice(
        "paper", ("paper", "authors"), COMPAT + "; authors: entries compete within their row"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BreadcrumbsTies:
    """breadcrumbs_ties."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.9, KEPT_BELOW, SHARE, per_adapter=True)
    gamma: tuple[float, ...] = number(0.01, OUTLIERS, UNIT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor", "model"), SCOPE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "mergekit"), COMPAT)
    normalize: bool | None = flag(None, NORMALIZE_MERGEKIT + "; default false")


def band_counts(n_entries: int, density: float, gamma: float) -> tuple[int, int]:
    """The k's of the smallest and of the largest magnitude that is kept; 0 for the latter if nothing is above it.

    The bounds belong to the band, so that equal magnitudes at its upper end are kept: a delta whose entries all have
    one magnitude has no outliers, and would vanish otherwise. At most n - 2 entries are outliers, because the n-th
    largest magnitude, the smallest, stands for "all are kept".
    """
    kept = kept_entries(n_entries, density, "paper")
    outliers = max(0, min(int(gamma * n_entries), n_entries - kept, n_entries - 2))
    return outliers + kept, outliers + 1 if outliers else 0


def counts(values: Mapping[str, Any], adapter: str, n_entries: int) -> tuple[int, ...]:
    """`Method.counts` of both: the magnitudes that the kept entries and the outliers end at."""
    return band_counts(n_entries, values["density"][adapter], values["gamma"][adapter])


def one_band(values: dict[str, Any]) -> None:
    """With `scope: model` the bounds are found over all sites, so their shares cannot differ between sites."""
    rules.one_density(values)
    if values["scope"] == "model" and isinstance(values["gamma"], list):
        raise MethodError(
            "gamma differs between sites, but with scope: model all sites have the same outliers; "
            "give one gamma per adapter, or write `scope: tensor`"
        )


def sum_rule(values: dict[str, Any]) -> None:
    """Rules of breadcrumbs; rows mean something in dense space only."""
    one_band(values)
    rules.divided_sum(values)
    for key, needed in (("scope", "tensor"), ("space", "dense")):
        if values["compat"] == "authors" and values[key] != needed:
            raise MethodError(
                f"compat authors sorts each row of a delta, but {key} is {values[key]}; "
                f"write `{key}: {needed}` or `compat: paper`"
            )


def ties_rule(values: dict[str, Any]) -> None:
    """Rules of breadcrumbs_ties."""
    one_band(values)
    rules.dare_ties(values)


METHODS: tuple[Method, ...] = (
    Method(
        name="breadcrumbs",
        family="breadcrumbs",
        summary="drop the largest and the smallest entries of each delta, sum the rest",
        reference=BREADCRUMBS_PAPER,
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=Breadcrumbs,
        work=cost.entries(cost.TRIMMED_TWICE),
        rule=sum_rule,
        counts=counts,
        kernel=f"{BREADCRUMBS}:breadcrumbs",
    ),
    Method(
        name="breadcrumbs_ties",
        family="breadcrumbs",
        summary="drop the largest and the smallest entries, elect a sign per entry, average what agrees",
        reference=f"{BREADCRUMBS_PAPER}; {TIES_PAPER}",
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=BreadcrumbsTies,
        work=cost.entries(cost.TRIMMED_TWICE),
        rule=ties_rule,
        counts=counts,
        kernel=f"{BREADCRUMBS}:breadcrumbs_ties",
    ),
)
