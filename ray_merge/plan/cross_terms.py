"""Methods that add up factors instead of their products (`Method.equal_ranks`): what adapters need for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_merge.errors import RecipeError
from ray_merge.fit.ranked import RankedFactors, distinct
from ray_merge.methods.registry import get
from ray_merge.plan.kinds import SiteKinds
from ray_merge.spec import Adapter, Merge, Site, TensorEntry

NAMED = 3
"""Adapters of one rank that a refusal names."""


def check_biases(merge: Merge, adapters: Mapping[str, Adapter]) -> None:
    """Sums of factors are multiplied; a bias is no product of two.

    Raises:
        RecipeError: which adapter trained one.
    """
    if not get(merge.method).adds_factors(merge.parameters):
        return
    compat = merge.parameters["compat"]
    for adapter in distinct(adapters[name] for name in merge.adapters):
        raw = [site for site, layout in adapter.layouts.items() if layout == "raw"]
        if raw:
            raise RecipeError(
                f"merge {merge.name!r}: compat: {compat} multiplies sums of factors, and adapter {adapter.name} "
                f"trained {raw[0]}, which has none; remove compat: {compat}"
            )


def check_ranks(
    merges: Sequence[Merge],
    adapters: Mapping[str, Adapter],
    sites: Mapping[str, Site],
    tensors: Mapping[str, TensorEntry],
) -> None:
    """Refuse to add up factors of different ranks; once for each set of adapters, by the kinds of their sites.

    Raises:
        RecipeError: which site, adapters and ranks.
    """
    adding: dict[tuple[str, ...], Merge] = {}
    for merge in merges:
        if get(merge.method).adds_factors(merge.parameters):
            adding.setdefault(merge.adapters, merge)
    if not adding:
        return
    kinds = SiteKinds(adapters, sites, tensors)
    for names, merge in adding.items():
        if any(len(set(ranks) - {0}) > 1 for _, ranks, _ in kinds.of(names)):
            site, by_rank = _different({name: adapters[name] for name in names}, sites)
            compat = merge.parameters["compat"]
            raise RecipeError(
                f"merge {merge.name!r}: {merge.method} with compat {compat} adds up factors and needs equal ranks, "
                f"but at {site} {_listed(by_rank)}; remove `compat: {compat}`"
            )


def _different(
    adapters: Mapping[str, Adapter], sites: Mapping[str, Site]
) -> tuple[str, dict[int, list[str]]]:
    """The first site with different ranks, and who has which."""
    for site in sites:
        by_rank: dict[int, list[str]] = {}
        for name, adapter in adapters.items():
            factors = adapter.factors
            if site in factors:
                rank = factors.rank if isinstance(factors, RankedFactors) else factors[site].rank
                by_rank.setdefault(rank, []).append(name)
        by_rank.pop(0, None)
        if len(by_rank) > 1:
            return site, by_rank
    raise AssertionError("unreachable: a kind of sites has a site")


def _listed(by_rank: Mapping[int, Sequence[str]]) -> str:
    return ", ".join(
        f"{' '.join(names[:NAMED])}{f' ... ({len(names)})' if len(names) > NAMED else ''} "
        f"{'has' if len(names) == 1 else 'have'} rank {rank}"
        for rank, names in sorted(by_rank.items())
    )
