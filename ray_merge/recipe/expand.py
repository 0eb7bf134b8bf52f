"""Entries of a recipe -> named merges: combinations of adapters, sweeps of parameters, defaults filled in.

Names: `scale/lambda=0.2,density=0.5` (keys as written, values by Python repr), `pairs/mnli__stsb`, and
`pairs/mnli__stsb/lambda=0.2` where an entry has both. A preference stands last, so that merges which differ in it alone
lie side by side: `tara/mnli=0.25,stsb=0.75`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import combinations, product
from math import comb, prod
from typing import Any

from ray_merge.errors import MethodError, RecipeError
from ray_merge.methods.registry import get
from ray_merge.methods.resolve import resolve_parameters
from ray_merge.recipe.arguments import check_list
from ray_merge.recipe.model import MergeSource, Recipe
from ray_merge.recipe.preferences import check_preferences, count_preferences, preferences_of
from ray_merge.recipe.source import Source, nearest
from ray_merge.spec import Merge

MAX_NAME_BYTES = 200
"""Folder names may have 255 bytes on usual file systems."""


def expand(recipe: Recipe, source: Source) -> list[Merge]:
    """Every merge of a recipe, in file order, with all parameters filled in.

    Raises:
        RecipeError: unknown method, parameter or adapter, two merges with one name, more than `max_merges`.
    """
    total = sum(_count(entry, recipe, source.where(("merges", i))) for i, entry in enumerate(recipe.merges))
    if total > recipe.max_merges:
        count = total if total < 10**12 else "over 10^12"
        raise RecipeError(
            f"{source.name}: the recipe expands to {count} merges, more than max_merges = {recipe.max_merges}; "
            "shorten a sweep, combinations or preferences, or raise max_merges"
        )
    merges: list[Merge] = []
    first: dict[str, str] = {}
    for index, entry in enumerate(recipe.merges):
        where = source.where(("merges", index))
        for merge in _expand_entry(entry, recipe, where):
            if merge.name in first:
                raise RecipeError(
                    f"{where}: two merges are named {merge.name!r} (the other: {first[merge.name]})"
                )
            first[merge.name] = where
            merges.append(merge)
    _refuse_nested(first)
    return merges


def _refuse_nested(names: Mapping[str, str]) -> None:
    # `scale` and `scale/lambda=0.2` would share a folder, and the outer merge would look damaged.
    for name, where in names.items():
        parent = name.rpartition("/")[0]
        while parent:
            if parent in names:
                raise RecipeError(f"{where}: merge {name!r} would lie inside merge {parent!r}; rename one")
            parent = parent.rpartition("/")[0]


def select(merges: Sequence[Merge], only: Sequence[str]) -> list[Merge]:
    """The merges whose name equals or matches (glob) one of `only`; all of them when it is empty.

    Raises:
        Refusal: a pattern that matches no merge, or a text where a list of them belongs.
    """
    check_list("only", only)
    for pattern in only:
        if not any(merge.name == pattern or fnmatchcase(merge.name, pattern) for merge in merges):
            raise RecipeError(f"--only {pattern}: no such merge{nearest(pattern, [m.name for m in merges])}")
    return [m for m in merges if not only or any(m.name == p or fnmatchcase(m.name, p) for p in only)]


def _sizes(entry: MergeSource) -> list[int]:
    if entry.combinations is None:
        return []
    return entry.combinations.choose


def _count(entry: MergeSource, recipe: Recipe, where: str) -> int:
    names = _adapters(entry, recipe, where)
    for size in _sizes(entry):
        if not 1 <= size <= len(names):
            raise RecipeError(f"{where}: combinations choose {size} of {len(names)} adapters")
    sizes = _sizes(entry) if entry.combinations else None
    if sizes is None:
        subsets = count_preferences(entry, len(names), where)
    else:
        subsets = sum(comb(len(names), size) * count_preferences(entry, size, where) for size in sizes)
    for key, values in (entry.sweep or {}).items():
        if not values:
            raise RecipeError(f"{where}: sweep over {key} has no values")
    return subsets * prod(len(values) for values in (entry.sweep or {}).values())


def _adapters(entry: MergeSource, recipe: Recipe, where: str) -> list[str]:
    names = list(recipe.adapters) if entry.adapters is None else entry.adapters
    if not names:
        raise RecipeError(f"{where}: merge {entry.name!r} has no adapters")
    seen: set[str] = set()
    for name in names:
        if name not in recipe.adapters:
            raise RecipeError(f"{where}: unknown adapter {name!r}{nearest(name, list(recipe.adapters))}")
        if name in seen:
            raise RecipeError(f"{where}: adapter {name!r} stands twice in merge {entry.name!r}")
        seen.add(name)
    return names


def _expand_entry(entry: MergeSource, recipe: Recipe, where: str) -> Iterator[Merge]:
    names = _adapters(entry, recipe, where)
    subsets: list[tuple[str, Sequence[str]]] = [("", names)]
    if entry.combinations is not None:
        subsets = [("__".join(some), some) for size in _sizes(entry) for some in combinations(names, size)]
    sweep = entry.sweep or {}
    twice = next((key for key in sweep if key in entry.parameters), None)
    if twice is not None:
        raise RecipeError(f"{where}: {twice} stands in parameters and in sweep of merge {entry.name!r}")
    check_preferences(entry, names, where)
    _check_heads(entry, names, where)
    for label, subset in subsets:
        for values, (preferred, preference) in product(
            product(*sweep.values()), list(preferences_of(entry, subset))
        ):
            point = dict(zip(sweep, values, strict=True))
            suffix = ",".join(f"{key}={value!r}" for key, value in point.items())
            if any(character in suffix for character in "/\\\n\r"):
                raise RecipeError(
                    f"{where}: {suffix!r} cannot name an output folder; sweep over plainer values"
                )
            name = "/".join(part for part in (entry.name, label, suffix, preferred) if part)
            given = {**entry.parameters, **point, **preference}
            parameters = _resolve(entry, name, tuple(subset), given, recipe, where)
            yield Merge(
                name=name,
                method=get(entry.merge_method).name,
                adapters=tuple(subset),
                parameters=parameters,
                export=entry.export,
                export_rank=entry.export_rank,
                export_tolerance=entry.export_tolerance,
                export_class=entry.export_class,
                heads=entry.heads,
                seed=entry.seed,
                sweep=tuple(point.items()),
                combined=entry.combinations is not None,
                preferred=entry.preferences is not None,
            )


def _check_heads(entry: MergeSource, names: Sequence[str], where: str) -> None:
    """A head belongs to a checkpoint, and to an adapter of every merge that the entry expands to."""
    if entry.heads is None:
        return
    place = f"{where}: merge {entry.name!r}: heads"
    if entry.heads not in names:
        raise RecipeError(f"{place}: {entry.heads!r} is none of its adapters{nearest(entry.heads, names)}")
    if entry.export == "adapter":
        raise RecipeError(
            f"{place} writes a checkpoint with the head of {entry.heads}, but export: adapter writes none; write "
            "export: checkpoint or export: both, or leave heads out (heads/ holds every head)"
        )
    if any(size < len(names) for size in _sizes(entry)):
        raise RecipeError(
            f"{place}: combinations leave {entry.heads} out of some merges; write those with {entry.heads} as entries "
            "of their own, or leave heads out (heads/ holds every head)"
        )


def _resolve(
    entry: MergeSource,
    name: str,
    adapters: tuple[str, ...],
    given: dict[str, Any],
    recipe: Recipe,
    where: str,
) -> dict[str, Any]:
    if len(name.encode()) > MAX_NAME_BYTES:
        raise RecipeError(
            f"{where}: {name!r} is too long for a folder ({len(name.encode())} bytes, at most {MAX_NAME_BYTES}); "
            "use shorter names of adapters or shorter values in the sweep and the preferences"
        )
    try:
        if entry.combinations is not None:
            given = {key: _restrict(value, adapters, recipe) for key, value in given.items()}
        return resolve_parameters(get(entry.merge_method), given, adapters)
    except MethodError as error:
        raise RecipeError(f"{where}: merge {name!r}: {error}") from error


def _restrict(value: Any, adapters: Sequence[str], recipe: Recipe) -> Any:
    # A weight per adapter is written once for all adapters; a combination takes its own part of it.
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if key in adapters or key not in recipe.adapters}
    if isinstance(value, list):
        return [
            {**item, "value": _restrict(item["value"], adapters, recipe)}
            if isinstance(item, dict) and "value" in item
            else item
            for item in value
        ]
    return value
