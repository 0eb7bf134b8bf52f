"""Declarations of isotropic merging. Default: 0.8 of the directions are common, scale 1 (arXiv 2502.04959)."""

from __future__ import annotations

from dataclasses import dataclass

from ray_merge.methods import cost
from ray_merge.methods.catalogue.common import LAMBDA, WEIGHT
from ray_merge.methods.catalogue.tsv import sizes
from ray_merge.methods.declare import Interval, Method, choice, number

ISOTROPIC = "ray_merge.methods.isotropic"
ISO_PAPER = "Isotropic merging, arXiv 2502.04959"

SPECTRUM = "which singular values count: those low-rank updates have or, as published, all of a dense (or core) matrix"
SPACE = "with spectrum full: count those of the dense delta, min(O, I), or of the core matrix, min(O, I, R)"


@dataclass(frozen=True, kw_only=True, slots=True)
class IsoC:
    """iso_c."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    spectrum: str = choice("rank", ("rank", "full"), SPECTRUM)
    space: str = choice("dense", ("dense", "core"), SPACE)


@dataclass(frozen=True, kw_only=True, slots=True)
class IsoCts:
    """iso_cts."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    common: float = number(
        0.8,
        "share of the directions taken from the sum; the rest is split evenly among adapters",
        Interval(0, 1),
    )
    spectrum: str = choice("rank", ("rank", "full"), SPECTRUM)
    space: str = choice("dense", ("dense", "core"), SPACE)


def task_directions(n_all: int, common: float, n_tasks: int) -> int:
    """How many of `n_all` directions each of `n_tasks` adapters gets; those that are left are common.

    Rounded as published, half to even; but never more than there are, where the published number of common
    directions becomes negative (11 directions, 4 adapters, common 0).
    """
    if not n_tasks:
        return 0
    rest = n_all - int(n_all * common)
    return min(round(rest / n_tasks), n_all // n_tasks)


METHODS: tuple[Method, ...] = (
    Method(
        name="iso_c",
        factors_only=True,
        family="isotropic",
        summary="lambda * mean(S) * U V^T of sum_i weight_i * delta_i = U S V^T",
        reference=ISO_PAPER,
        spaces=("dense", "core"),
        low_rank_spaces=("dense", "core"),
        parameters=IsoC,
        sizes=sizes,
        work=cost.spectral,
        kernel=f"{ISOTROPIC}:iso_c",
    ),
    Method(
        name="iso_cts",
        factors_only=True,
        family="isotropic",
        summary="a flat spectrum over the top directions of the sum and each adapter's own outside of them",
        reference=ISO_PAPER,
        spaces=("dense", "core"),
        low_rank_spaces=("dense", "core"),
        parameters=IsoCts,
        sizes=sizes,
        work=cost.spectral,
        kernel=f"{ISOTROPIC}:iso_cts",
    ),
)
