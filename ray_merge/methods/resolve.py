"""A recipe's parameters -> checked, complete, canonical parameters -> one dataclass instance per site.

Owns: the forms of a value (scalar, gradient over depth, mapping by adapter, list of {filter, value}) and their
refusals. Never imports torch. Resolving resolved parameters gives them back unchanged.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_merge.errors import MethodError
from ray_merge.methods.declare import Method, Parameter
from ray_merge.methods.gradient import Knot, at_depth, even_knots, given_knots, is_gradient, run_of


def resolve_parameters(method: Method, given: Mapping[str, Any], adapters: Sequence[str]) -> dict[str, Any]:
    """Check `given`, fill in every default, and bring each value into its one canonical JSON-able form.

    Args:
        method: whose parameters.
        given: by the recipe's keys; null means "not given".
        adapters: names in recipe order.

    Returns:
        By the recipe's keys, in declaration order. Per-adapter values are mappings by adapter. What differs between
        sites is a list of {filter, depth, value} that ends with items without filter; those with a depth are the
        knots of a gradient (methods/gradient.py).

    Raises:
        MethodError: unknown key or adapter, wrong type, value out of range, bad regex, missing parameter.
    """
    if not adapters:
        raise MethodError(f"{method.name} needs at least one adapter")
    declared = method.declared()
    for key in given:
        if key not in declared:
            raise MethodError(_unknown_key(method, str(key), list(declared)))
    values = {
        key: _resolve_one(f"{method.name}: {key}", item, given.get(key), tuple(adapters))
        for key, item in declared.items()
    }
    if method.rule is not None:
        try:
            method.rule(values)
        except MethodError as error:
            raise MethodError(f"{method.name}: {error}") from None
    return values


def at_site(
    method: Method,
    parameters: Mapping[str, Any],
    adapters: Sequence[str],
    site: str,
    depth: float | None = None,
) -> Any:
    """The instance of `method.parameters` that holds at `site`, tuples in the order of `adapters`.

    Args:
        method: whose parameters.
        parameters: what `resolve_parameters` returned.
        adapters: names in recipe order.
        site: runtime site name that filters are searched in.
        depth: of the site, in [0, 1]; None where there is none (`spec.Site`).

    Raises:
        MethodError: a value changes with depth, and the site has none.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(method.parameters):
        key = field.metadata.get("key") or field.name
        value = parameters[key]
        if isinstance(value, list):
            value = _chosen(f"{method.name}: {key}", value, site, depth)
        if isinstance(value, Mapping):
            value = tuple(value[name] for name in adapters)
        values[field.name] = value
    return method.parameters(**values)


def _chosen(place: str, items: Sequence[Mapping[str, Any]], site: str, depth: float | None) -> Any:
    first = next(index for index, item in enumerate(items) if re.search(item.get("filter", ""), site))
    knots = run_of(items, first)
    if not knots:
        return items[first]["value"]
    if depth is None:
        raise MethodError(
            f"{place} changes with depth, which a weight outside of a model with blocks has not"
        )
    return at_depth(knots, depth)


def _unknown_key(method: Method, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{method.name} has no parameter {key!r}{hint} Known: {', '.join(known)}"


def _resolve_one(place: str, item: Parameter, given: Any, adapters: tuple[str, ...]) -> Any:
    if given is None:
        if item.required:
            raise MethodError(f"{place} is required: {item.help}")
        return _spread(item, item.default, adapters)
    if isinstance(given, list | tuple) and not is_gradient(given):
        return _resolve_list(place, item, given, adapters)
    return _simplest([*_items(None, _resolve_value(place, item, given, adapters))])


def _resolve_list(place: str, item: Parameter, given: Sequence[Any], adapters: tuple[str, ...]) -> Any:
    if not item.per_site:
        raise MethodError(f"{place} is one value for the whole merge, got the list {list(given)!r}")
    for number, entry in enumerate(given, start=1):
        if not isinstance(entry, Mapping) or not {"value"} <= set(entry) <= {"filter", "depth", "value"}:
            raise MethodError(
                f"{place}, item {number} is {entry!r}; a list holds {{filter: <regex>, value: ...}} items, or "
                "numbers alone for a gradient over depth, and one value per adapter is written as a mapping by adapter"
            )
    resolved: list[dict[str, Any]] = []
    number = 0
    while number < len(given):
        where, entry = f"{place}, item {number + 1}", given[number]
        pattern = None if entry.get("filter") is None else _pattern(where, entry["filter"])
        knots, used = _knots(where, item, given, number, adapters)
        number += used
        if pattern is None and number < len(given):
            raise MethodError(f"{where} has no filter and so takes every site; put it last")
        resolved += _items(pattern, knots)
    if not resolved or "filter" in resolved[-1]:
        resolved.append({"value": _spread(item, item.default, adapters)})
    return _simplest(resolved)


def _knots(
    place: str, item: Parameter, given: Sequence[Mapping[str, Any]], first: int, adapters: tuple[str, ...]
) -> tuple[list[Knot], int]:
    """The knots that begin at an entry, and how many entries they are."""
    if "depth" not in given[first]:
        return _resolve_value(place, item, given[first]["value"], adapters), 1
    run = [
        entry
        for entry in given[first:]
        if "depth" in entry and entry.get("filter") == given[first].get("filter")
    ]
    values = [_resolve_value(place, item, entry["value"], adapters) for entry in run]
    if any(len(value) > 1 for value in values) or given[first : first + len(run)] != run:
        raise MethodError(
            f"{place}: the items of one gradient stand together, each with one depth and one value"
        )
    knots = [(entry["depth"], value[0][1]) for entry, value in zip(run, values, strict=True)]
    return given_knots(place, knots), len(run)


def _items(pattern: str | None, knots: Sequence[Knot]) -> Iterator[dict[str, Any]]:
    for depth, value in knots:
        where = {} if pattern is None else {"filter": pattern}
        yield {**where, **({"depth": depth} if len(knots) > 1 else {}), "value": value}


def _simplest(items: list[dict[str, Any]]) -> Any:
    return items[0]["value"] if len(items) == 1 and items[0].keys() == {"value"} else items


def _pattern(place: str, pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise MethodError(f"{place}: filter is {pattern!r}, expected a regular expression as text")
    try:
        re.compile(pattern)
    except re.error as error:
        raise MethodError(f"{place}: filter {pattern!r} is not a regular expression ({error})") from None
    return pattern


def _resolve_value(place: str, item: Parameter, given: Any, adapters: tuple[str, ...]) -> list[Knot]:
    """The knots of a scalar, a gradient, or a mapping of them by adapter; one knot where nothing changes with depth."""
    if not isinstance(given, Mapping):
        numbers = _numbers(place, item, given)
        return even_knots(dict.fromkeys(adapters, numbers) if item.per_adapter else numbers)
    if not item.per_adapter:
        raise MethodError(f"{place} has one value for all adapters, got the mapping {dict(given)!r}")
    for name in given:
        if name not in adapters:
            near = difflib.get_close_matches(str(name), adapters, n=1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise MethodError(f"{place} names {name!r}{hint}; the adapters are {', '.join(adapters)}")
    missing = [name for name in adapters if name not in given]
    if missing:
        raise MethodError(f"{place} has no value for {', '.join(missing)}; name every adapter of the merge")
    return even_knots({name: _numbers(f"{place} for {name}", item, given[name]) for name in adapters})


def _numbers(place: str, item: Parameter, given: Any) -> list[Any]:
    """One value, or the numbers of a gradient."""
    if not is_gradient(given):
        return [_scalar(place, item, given)]
    if not item.per_site:
        raise MethodError(f"{place} is one value for the whole merge, got the list {list(given)!r}")
    return [_scalar(f"{place}, value {number}", item, value) for number, value in enumerate(given, start=1)]


def _spread(item: Parameter, value: Any, adapters: tuple[str, ...]) -> Any:
    return dict.fromkeys(adapters, value) if item.per_adapter else value


def _scalar(place: str, item: Parameter, given: Any) -> Any:
    if item.kind == "flag":
        if not isinstance(given, bool):
            raise MethodError(f"{place} is {given!r}, expected true or false")
        return given
    if item.kind == "choice":
        if given not in item.choices:
            raise MethodError(f"{place} is {given!r}, expected one of {', '.join(item.choices)}")
        return given
    if item.kind == "text":
        return _text(place, item, given)
    if isinstance(given, bool) or not isinstance(given, int | float) or not _is_finite(given):
        raise MethodError(f"{place} is {given!r}, expected a finite number")
    if item.kind == "integer" and given != int(given):
        raise MethodError(f"{place} is {given!r}, expected a whole number")
    if given not in item.interval:
        raise MethodError(f"{place} is {given!r}, expected a number in {item.interval}")
    return int(given) if item.kind == "integer" else float(given)


def _text(place: str, item: Parameter, given: Any) -> str:
    is_number = isinstance(given, int) and not isinstance(given, bool)  # `layers: 3`
    if not isinstance(given, str) and not is_number:
        raise MethodError(f"{place} is {given!r}, expected text")
    try:
        if item.check is not None:
            item.check(str(given))
    except ValueError as error:
        raise MethodError(f"{place} is {given!r}, expected {error}") from None
    return str(given)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False
