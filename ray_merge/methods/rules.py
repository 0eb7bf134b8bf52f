"""Rules that tie several parameters of a method together; torch-free, so that `plan` finds every refusal.

Each rule gets the resolved parameters of one method, completes what depends on other parameters and refuses
what cannot be merged as asked. Rules run twice on the same values without changing them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ray_merge.errors import MethodError
from ray_merge.methods.gradient import run_of

NEARLY_ZERO = 1e-8
"""mergekit's bound for a sum of weights that nothing may be divided by."""


def one_density(values: dict[str, Any]) -> None:
    """With `scope: model` the entries of all sites compete for one share, which cannot differ between sites."""
    if values.get("scope") == "model" and isinstance(values["density"], list):
        raise MethodError(
            "density differs between sites, but with scope: model all sites compete for one share; "
            "give one density per adapter, or write `scope: tensor` to trim each weight by its own threshold"
        )


def linear(values: dict[str, Any]) -> None:
    """Fill `normalize`, and refuse a division by a sum of weights near zero."""
    if values["normalize"] is None:
        values["normalize"] = values["compat"] != "peft"
    divided_sum(values)


def divided_sum(values: dict[str, Any]) -> None:
    """Refuse a division by a sum of weights near zero."""
    if not values["normalize"]:
        return
    way_out = "which normalize would divide by; set `normalize: false` or change a weight"
    for run, place in _runs(values["weight"]):
        totals = [sum(weights.values()) for _, weights in run]
        for (depth, _), total in zip(run, totals, strict=True):
            if abs(total) < NEARLY_ZERO:
                raise MethodError(f"the weights{place}{_at(depth)} sum to {total:g}, {way_out}")
        if min(totals) < 0 < max(totals):
            raise MethodError(
                f"the weights{place} sum to {totals[0]:g} at depth 0 and change sign with depth, so that they sum to "
                f"0 in between, {way_out}"
            )


def some_weight(values: dict[str, Any]) -> None:
    """Refuse weights that are all zero: nothing would be left to average."""
    for run, place in _runs(values["weight"]):
        for depth, weights in run:
            if not any(weights.values()):
                raise MethodError(
                    f"the weights{place}{_at(depth)} are all 0, so that nothing is averaged; give one adapter a weight"
                )


def ties(values: dict[str, Any]) -> None:
    """Rules of the methods that trim and elect signs."""
    one_density(values)
    _mergekit_normalize(values, default=True)
    authors_weights(values)


def knots_ties(values: dict[str, Any]) -> None:
    """Rules of ties in the KnOTS basis."""
    one_density(values)
    authors_weights(values)


def dare_linear(values: dict[str, Any]) -> None:
    """Rules of dare_linear."""
    _mergekit_normalize(values, default=False)
    divided_sum(values)


def dare_ties(values: dict[str, Any]) -> None:
    """Rules of dare_ties."""
    _mergekit_normalize(values, default=False)
    authors_weights(values)


def authors_weights(values: dict[str, Any]) -> None:
    """The KnOTS code multiplies every adapter by the first weight; different weights would be ignored."""
    if values["compat"] != "authors":
        return
    for weights, place in _alternatives(values["weight"]):
        if len(set(weights.values())) > 1:
            raise MethodError(
                "compat authors has one weight for all adapters (the KnOTS code uses the first), but "
                f"the weights{place} are {list(weights.values())}; make them equal or write `compat: paper`"
            )


def _mergekit_normalize(values: dict[str, Any], *, default: bool) -> None:
    if values["compat"] == "mergekit":
        values["normalize"] = default if values["normalize"] is None else values["normalize"]
    elif values["normalize"] is not None:
        raise MethodError(
            f"normalize belongs to compat mergekit, but compat is {values['compat']}; "
            "remove normalize or write `compat: mergekit`"
        )


def _alternatives(value: Any) -> Iterator[tuple[Mapping[str, float], str]]:
    """Every mapping by adapter that a resolved per-adapter value may become at some site, and its place."""
    for run, place in _runs(value):
        for depth, by_adapter in run:
            yield by_adapter, place + _at(depth)


def _runs(value: Any) -> Iterator[tuple[list[tuple[float | None, Mapping[str, float]]], str]]:
    """The forms that a resolved per-adapter value has, each with its knots (depth, mapping by adapter) and place."""
    if isinstance(value, Mapping):
        yield [(None, value)], ""
        return
    first = 0
    while first < len(value):
        item = value[first]
        knots: list[tuple[float | None, Mapping[str, float]]] = [*run_of(value, first)]
        found = knots or [(None, item["value"])]
        place = (
            f" for filter {item['filter']!r}"
            if "filter" in item
            else " for the remaining sites"
            if first
            else ""
        )
        yield found, place
        first += len(found)


def _at(depth: float | None) -> str:
    return "" if depth is None else f" at depth {depth:g}"
