"""Preferences of a merge entry: one merge for each way to weigh its tasks, listed or from a grid on the simplex."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Any

from ray_merge.errors import MethodError, RecipeError
from ray_merge.methods.registry import METHODS, get
from ray_merge.recipe.model import MergeSource, Simplex
from ray_merge.recipe.source import nearest

KEY = "preference"
"""The parameter that a preference sets."""

DIGITS = 6
"""Significant ones of a number in a name; the merge has the number itself."""


def count_preferences(entry: MergeSource, n_adapters: int, where: str) -> int:
    """How many preferences a merge of so many adapters has; 1 for an entry without any.

    Raises:
        RecipeError: a grid without a point, because each adapter has at least one share.
    """
    if not isinstance(entry.preferences, Simplex):
        return 1 if entry.preferences is None else len(entry.preferences)
    total = entry.preferences.simplex
    found = comb(total - 1, n_adapters - 1)
    if not found:
        raise RecipeError(
            f"{where}: preferences: simplex: {total} cannot give each of {n_adapters} adapters of merge {entry.name!r} "
            f"a share of 1/{total} or more; write {n_adapters} or more"
        )
    return found


def check_preferences(entry: MergeSource, names: Sequence[str], where: str) -> None:
    """Refuse preferences that the method does not take, that stand elsewhere too, or that leave out an adapter.

    Args:
        entry: of the recipe.
        names: of its adapters.
        where: for messages.

    Raises:
        RecipeError: what is wrong.
    """
    if entry.preferences is None:
        return
    place = f"{where}: merge {entry.name!r}"
    _check_method(entry.merge_method, place)
    for other in ("parameters", "sweep"):
        if KEY in (getattr(entry, other) or {}):
            raise RecipeError(f"{place} has preferences, and {KEY} in {other}; write only one of them")
    if isinstance(entry.preferences, Simplex):
        return
    for number, given in enumerate(entry.preferences, start=1):
        unknown = next((name for name in given if name not in names), None)
        if unknown is not None:
            raise RecipeError(f"{place}: preference {number} names {unknown!r}{nearest(unknown, names)}")
        missing = [name for name in names if name not in given]
        if missing:
            raise RecipeError(
                f"{place}: preference {number} has no value for {', '.join(missing)}; name every adapter of the merge"
            )


def _check_method(name: str, place: str) -> None:
    try:
        method = get(name)
    except MethodError as error:
        raise RecipeError(f"{place}: {error}") from error
    if KEY not in method.declared():
        takers = ", ".join(one.name for one in METHODS if KEY in one.declared())
        raise RecipeError(f"{place}: {method.name} takes no preferences; the methods that do are {takers}")


def preferences_of(entry: MergeSource, adapters: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The last part of a merge's name and the parameters that it sets; one of neither for an entry without any.

    Args:
        entry: of the recipe.
        adapters: of the merge, in its order; those of one combination.
    """
    if entry.preferences is None:
        yield "", {}
        return
    listed = (
        _grid(entry.preferences.simplex, adapters)
        if isinstance(entry.preferences, Simplex)
        else entry.preferences
    )
    for given in listed:
        own = {name: float(given[name]) for name in adapters}
        label = ",".join(f"{name}={float(f'{value:.{DIGITS}g}')!r}" for name, value in own.items())
        yield label, {KEY: own}


def _grid(total: int, adapters: Sequence[str]) -> Iterator[dict[str, float]]:
    """Every k / total with whole k >= 1 that sum up to it, the first adapter's share growing slowest."""
    for bars in combinations(range(1, total), len(adapters) - 1):
        ends = (0, *bars, total)
        yield {
            name: (stop - start) / total
            for name, start, stop in zip(adapters, ends[:-1], ends[1:], strict=True)
        }
