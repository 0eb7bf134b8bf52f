"""Declarations of TIES and KnOTS-TIES.

Defaults: keep 0.2, scale by 1 (arXiv 2306.01708); the KnOTS authors' ViT settings keep 0.2 (arXiv 2410.19735 and
its configs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_merge.methods import rules
from ray_merge.methods.catalogue.common import (
    COMPAT,
    KEPT,
    LAMBDA,
    NORMALIZE_MERGEKIT,
    SCOPE,
    SHARE,
    SPACE,
    WEIGHT,
)
from ray_merge.methods.declare import Method, choice, flag, number

TIES = "ray_merge.methods.ties"
TIES_PAPER = "TIES-Merging, arXiv 2306.01708"
KNOTS_PAPER = "KnOTS, arXiv 2410.19735"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ties:
    """ties."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.2, KEPT, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("model", ("model", "tensor"), SCOPE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "peft", "mergekit", "authors"), COMPAT)
    normalize: bool | None = flag(None, NORMALIZE_MERGEKIT + "; default true")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnotsTies:
    """knots_ties."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.2, KEPT, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("model", ("model", "tensor"), SCOPE)
    compat: str = choice("paper", ("paper", "authors"), COMPAT)


def kept_entries(n_entries: int, density: float, compat: str) -> int:
    """How many of `n_entries` survive a trim to `density`."""
    if density >= 1:
        return n_entries
    floor = int(density * n_entries)
    if compat == "authors":
        return floor + 1
    # PEFT keeps nothing where the floor is 0; mergekit stops there with an assertion.
    return floor if compat == "peft" else min(n_entries, max(1, floor))


def counts(values: Mapping[str, Any], adapter: str, n_entries: int) -> tuple[int, ...]:
    """`Method.counts` of both: the magnitude that the kept entries end at."""
    return (kept_entries(n_entries, values["density"][adapter], values["compat"]),)


METHODS: tuple[Method, ...] = (
    Method(
        name="ties",
        family="ties",
        summary="trim each delta, elect a sign per entry, average the entries that agree",
        reference=TIES_PAPER,
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=Ties,
        rule=rules.ties,
        counts=counts,
        kernel=f"{TIES}:ties",
    ),
    Method(
        name="knots_ties",
        family="ties",
        summary="ties on the coordinates S V_i of [delta_1 .. delta_T] = U S [V_1 .. V_T]",
        reference=KNOTS_PAPER,
        spaces=("knots",),
        low_rank_spaces=("knots",),
        parameters=KnotsTies,
        rule=rules.knots_ties,
        counts=counts,
        kernel=f"{TIES}:knots_ties",
    ),
)
