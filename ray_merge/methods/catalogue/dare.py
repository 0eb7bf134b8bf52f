"""Declarations of the DARE family. Defaults: drop 0.9 (arXiv 2311.03099); the KnOTS authors drop 0.1."""

from __future__ import annotations

from dataclasses import dataclass

from ray_merge.methods import rules
from ray_merge.methods.catalogue.common import (
    COMPAT,
    ENTRYWISE,
    KEPT_AT_RANDOM,
    LAMBDA,
    NORMALIZE_MERGEKIT,
    SHARE,
    SPACE,
    WEIGHT,
)
from ray_merge.methods.catalogue.ties import KNOTS_PAPER, TIES_PAPER
from ray_merge.methods.declare import Method, choice, flag, number

DARE = "ray_merge.methods.dare"
DARE_PAPER = "DARE, arXiv 2311.03099"


@dataclass(frozen=True, kw_only=True, slots=True)
class DareLinear:
    """dare_linear."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.1, KEPT_AT_RANDOM, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor",), ENTRYWISE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "mergekit"), COMPAT)
    normalize: bool | None = flag(
        None, "compat mergekit only: divide by the sum of the weights; default false"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DareTies:
    """dare_ties."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.1, KEPT_AT_RANDOM, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor",), ENTRYWISE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "peft", "mergekit", "authors"), COMPAT)
    normalize: bool | None = flag(None, NORMALIZE_MERGEKIT + "; default false")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnotsDareTies:
    """knots_dare_ties."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.9, KEPT_AT_RANDOM, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor",), ENTRYWISE)
    compat: str = choice("paper", ("paper", "authors"), COMPAT)


METHODS: tuple[Method, ...] = (
    Method(
        name="dare_linear",
        family="dare",
        summary="drop entries at random, rescale the rest, sum",
        reference=DARE_PAPER,
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=DareLinear,
        rule=rules.dare_linear,
        kernel=f"{DARE}:dare_linear",
    ),
    Method(
        name="dare_ties",
        family="dare",
        summary="drop entries at random, rescale the rest, elect a sign per entry, average what agrees",
        reference=f"{DARE_PAPER}; {TIES_PAPER}",
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=DareTies,
        rule=rules.dare_ties,
        kernel=f"{DARE}:dare_ties",
    ),
    Method(
        name="knots_dare_ties",
        family="dare",
        summary="dare_ties on the coordinates S V_i of [delta_1 .. delta_T] = U S [V_1 .. V_T]",
        reference=f"{KNOTS_PAPER}; {DARE_PAPER}",
        spaces=("knots",),
        low_rank_spaces=("knots",),
        parameters=KnotsDareTies,
        rule=rules.authors_weights,
        kernel=f"{DARE}:knots_dare_ties",
    ),
)
