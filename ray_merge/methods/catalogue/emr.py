"""Declaration of EMR-Merging, and the one number that it gives each adapter; methods/emr.py explains `compat`."""

from __future__ import annotations

from dataclasses import dataclass

from ray_merge.methods import cost
from ray_merge.methods.catalogue.common import COMPAT, SPACE, WEIGHT
from ray_merge.methods.declare import Method, choice, number

NAME = "emr"
EMR_PAPER = "EMR-Merging, arXiv 2405.17461"

LAMBDA_UNIFIED = "factor of the unified update in the checkpoint; adapters that are given back have rescalers"
SCOPE_RESCALERS = "over what an adapter has one rescaler: the whole model, or each weight for itself"


@dataclass(frozen=True, kw_only=True, slots=True)
class Emr:
    """emr."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA_UNIFIED, key="lambda", per_site=True)
    scope: str = choice("model", ("model", "tensor"), SCOPE_RESCALERS)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "authors"), COMPAT)


def rescaler(own: float, masked: float) -> float:
    """The sum of |tau_i| over that of |tau_u mask_i|; 1 where nothing is left of an adapter."""
    return own / masked if masked > 0 else 1.0


METHODS: tuple[Method, ...] = (
    Method(
        name=NAME,
        family="emr",
        summary="the largest agreeing entry under each elected sign; a mask and a rescaler give each adapter back",
        reference=EMR_PAPER,
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=Emr,
        work=cost.entries(cost.MASKED),
        kernel="ray_merge.methods.emr:emr",
    ),
)
