"""Declarations of consensus merging.

The paper chooses the factor of each task's mask from 0.2 to 0.6 on validation data; 0.4 is the middle. Two votes
are its own choice: they drop what no task and what only one task uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import MethodError
from ray_merge.methods import cost, rules
from ray_merge.methods.catalogue.common import COMPAT, ENTRYWISE, KEPT, LAMBDA, SCOPE, SHARE, SPACE, WEIGHT
from ray_merge.methods.catalogue.ties import TIES_PAPER, kept_entries
from ray_merge.methods.declare import Interval, Method, choice, integer, number

TALL = "ray_merge.methods.tall"
TALL_PAPER = "TALL-masks and Consensus, arXiv 2405.07813"

MASK_LAMBDA = "an adapter votes for an entry if its own part is at least this many times the others' part"
VOTES = "votes that an entry needs to be kept; 0 keeps all"
COUNT = Interval(0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Consensus:
    """consensus."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    mask_lambda: tuple[float, ...] = number(0.4, MASK_LAMBDA, COUNT, per_adapter=True)
    votes: int = integer(VOTES, COUNT, default=2)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor",), ENTRYWISE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsensusTies:
    """consensus_ties."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.2, KEPT, SHARE, per_adapter=True)
    mask_lambda: tuple[float, ...] = number(0.4, MASK_LAMBDA, COUNT, per_adapter=True)
    votes: int = integer(VOTES, COUNT, default=2)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("model", ("model", "tensor"), SCOPE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "authors"), COMPAT)


def counts(values: Mapping[str, Any], adapter: str, n_entries: int) -> tuple[int, ...]:
    """`Method.counts` of consensus_ties: the magnitude that the kept entries end at."""
    return (kept_entries(n_entries, values["density"][adapter], values["compat"]),)


def enough_voters(values: dict[str, Any]) -> None:
    """Refuse more votes than there are adapters: nothing would be kept."""
    weight = values["weight"]
    n_adapters = len(weight if isinstance(weight, Mapping) else weight[0]["value"])
    if values["votes"] > n_adapters:
        noun = "adapter" if n_adapters == 1 else "adapters"
        raise MethodError(
            f"votes is {values['votes']}, but the merge has {n_adapters} {noun}, so that no entry would be kept; "
            f"write `votes: {n_adapters}` or less"
        )


def ties_rule(values: dict[str, Any]) -> None:
    """Rules of consensus_ties."""
    rules.one_density(values)
    rules.authors_weights(values)
    enough_voters(values)


METHODS: tuple[Method, ...] = (
    Method(
        name="consensus",
        family="consensus",
        summary="sum; keep the entries that enough adapters claim: |delta_i| >= mask_lambda_i |sum - delta_i|",
        reference=TALL_PAPER,
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=Consensus,
        work=cost.entries(cost.VOTED),
        rule=enough_voters,
        kernel=f"{TALL}:consensus",
    ),
    Method(
        name="consensus_ties",
        family="consensus",
        summary="trim, elect, sum what agrees; keep the entries that enough adapters claim",
        reference=f"{TALL_PAPER}; {TIES_PAPER}",
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=ConsensusTies,
        work=cost.entries(cost.VOTED_AND_ELECTED),
        rule=ties_rule,
        counts=counts,
        kernel=f"{TALL}:consensus_ties",
    ),
)
