"""Values that change with depth: numbers at knots from the first block (depth 0) to the last (depth 1), linear between.

A recipe writes `[0, 0.5, 1]`, as for mergekit (mergekit/config.py `evaluate_setting`, plan.py `plan_slice`), whose
conventions hold: equal distances between the knots, depth = block / (blocks - 1), 1 for a model of one block, and 0
for what stands outside of the blocks: embeddings, the last norm, the head. Resolved parameters hold a gradient as one
item {depth, value} for each knot, so that whoever looks at every value that may hold somewhere sees the knots.
Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ray_merge.errors import MethodError

Knot = tuple[float, Any]
"""Depth, and the resolved value there: a number, or numbers by adapter."""


def is_gradient(given: Any) -> bool:
    """Whether a recipe's value is a list of plain numbers."""
    return (
        isinstance(given, list | tuple)
        and bool(given)
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
    )


def even_knots(values: Sequence[float] | Mapping[str, Sequence[float]]) -> list[Knot]:
    """The knots of values at equal distances; of one gradient, or of one for each adapter, at the knots of all."""
    by_name = values if isinstance(values, Mapping) else {"": values}
    lengths = {len(numbers) for numbers in by_name.values()}
    depths = sorted({place / (length - 1) for length in lengths if length > 1 for place in range(length)})
    if not depths:
        alike = {name: numbers[0] for name, numbers in by_name.items()}
        return [(0.0, alike if isinstance(values, Mapping) else alike[""])]
    knots: list[Knot] = []
    for depth in depths:
        there = {name: at_depth(_evenly(numbers), depth) for name, numbers in by_name.items()}
        knots.append((depth, there if isinstance(values, Mapping) else there[""]))
    return _shortest(knots)


def given_knots(place: str, knots: Sequence[tuple[Any, Any]]) -> list[Knot]:
    """Knots as {depth, value} items write them.

    Raises:
        MethodError: depths that are no numbers, do not rise, or do not reach from 0 to 1.
    """
    depths = [depth for depth, _ in knots]
    rises = is_gradient(depths) and all(one < other for one, other in pairwise(depths))
    if not rises or depths[0] != 0 or depths[-1] != 1:
        raise MethodError(
            f"{place}: the depths are {depths}; they rise from 0 (first block) to 1 (last block)"
        )
    return _shortest([(float(depth), value) for depth, value in knots])


def at_depth(knots: Sequence[Knot], depth: float) -> Any:
    """The value at a depth in [0, 1]."""
    for (low, one), (high, other) in pairwise(knots):
        if depth <= high:
            share = (depth - low) / (high - low)
            if not isinstance(one, Mapping):
                return _between(one, other, share)
            return {name: _between(one[name], other[name], share) for name in one}
    return knots[-1][1]


def run_of(items: Sequence[Mapping[str, Any]], first: int) -> list[Knot]:
    """The knots of the gradient whose first item is `items[first]`; empty where that is one value at every depth."""
    knots: list[Knot] = []
    for item in items[first:]:
        if item.get("filter") != items[first].get("filter") or "depth" not in item:
            break
        if knots and item["depth"] <= knots[-1][0]:
            break
        knots.append((item["depth"], item["value"]))
    return knots


def has_gradient(value: Any) -> bool:
    """Whether a resolved value changes with depth at some site."""
    return isinstance(value, list) and any("depth" in item for item in value)


def _evenly(numbers: Sequence[float]) -> list[Knot]:
    return [(place / max(1, len(numbers) - 1), number) for place, number in enumerate(numbers)]


def _between(one: float, other: float, share: float) -> float:
    if one == other:
        return one
    value = (1 - share) * one + share * other
    return min(max(value, min(one, other)), max(one, other))


def _shortest(knots: list[Knot]) -> list[Knot]:
    # Values that mean the same resolve to the same: a gradient of equal numbers is one number.
    return knots[:1] if all(value == knots[0][1] for _, value in knots) else knots
