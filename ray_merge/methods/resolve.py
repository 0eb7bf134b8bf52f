"""A recipe's parameters -> checked, complete, canonical parameters -> one dataclass instance per site.

Owns: the three forms of a value (scalar, mapping by adapter, list of {filter, value}) and their refusals.
Never imports torch. Resolving resolved parameters gives them back unchanged.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray_merge.errors import MethodError
from ray_merge.methods.declare import Method, Parameter


def resolve_parameters(method: Method, given: Mapping[str, Any], adapters: Sequence[str]) -> dict[str, Any]:
    """Check `given`, fill in every default, and bring each value into its one canonical JSON-able form.

    Args:
        method: whose parameters.
        given: by the recipe's keys; null means "not given".
        adapters: names in recipe order.

    Returns:
        By the recipe's keys, in declaration order. Per-adapter values are mappings by adapter, or lists of
        {filter, value: mapping} that end with an item without filter.

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


def at_site(method: Method, parameters: Mapping[str, Any], adapters: Sequence[str], site: str) -> Any:
    """The instance of `method.parameters` that holds at `site`, tuples in the order of `adapters`.

    Args:
        method: whose parameters.
        parameters: what `resolve_parameters` returned.
        adapters: names in recipe order.
        site: runtime site name that filters are searched in.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(method.parameters):
        key = field.metadata.get("key") or field.name
        value = parameters[key]
        if isinstance(value, list):
            value = next(item["value"] for item in value if re.search(item.get("filter", ""), site))
        if isinstance(value, Mapping):
            value = tuple(value[name] for name in adapters)
        values[field.name] = value
    return method.parameters(**values)


def _unknown_key(method: Method, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{method.name} has no parameter {key!r}{hint} Known: {', '.join(known)}"


def _resolve_one(place: str, item: Parameter, given: Any, adapters: tuple[str, ...]) -> Any:
    if given is None:
        if item.required:
            raise MethodError(f"{place} is required: {item.help}")
        return _spread(item, item.default, adapters)
    if isinstance(given, list | tuple):
        return _resolve_list(place, item, given, adapters)
    return _resolve_value(place, item, given, adapters)


def _resolve_list(place: str, item: Parameter, given: Sequence[Any], adapters: tuple[str, ...]) -> Any:
    if not item.per_site:
        raise MethodError(f"{place} is one value for the whole merge, got the list {list(given)!r}")
    resolved: list[dict[str, Any]] = []
    for number, entry in enumerate(given, start=1):
        where = f"{place}, item {number}"
        if not isinstance(entry, Mapping) or not {"value"} <= set(entry) <= {"filter", "value"}:
            raise MethodError(
                f"{where} is {entry!r}; a list holds {{filter: <regex>, value: ...}} items, "
                "and one value per adapter is written as a mapping by adapter"
            )
        value = _resolve_value(where, item, entry["value"], adapters)
        pattern = entry.get("filter")
        if pattern is None:
            if number < len(given):
                raise MethodError(f"{where} has no filter and so takes every site; put it last")
            return [*resolved, {"value": value}] if resolved else value
        resolved.append({"filter": _pattern(where, pattern), "value": value})
    return [*resolved, {"value": _spread(item, item.default, adapters)}]


def _pattern(place: str, pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise MethodError(f"{place}: filter is {pattern!r}, expected a regular expression as text")
    try:
        re.compile(pattern)
    except re.error as error:
        raise MethodError(f"{place}: filter {pattern!r} is not a regular expression ({error})") from None
    return pattern


def _resolve_value(place: str, item: Parameter, given: Any, adapters: tuple[str, ...]) -> Any:
    if not isinstance(given, Mapping):
        return _spread(item, _scalar(place, item, given), adapters)
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
    return {name: _scalar(f"{place} for {name}", item, given[name]) for name in adapters}


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
    if isinstance(given, bool) or not isinstance(given, int | float) or not _is_finite(given):
        raise MethodError(f"{place} is {given!r}, expected a finite number")
    if item.kind == "integer" and given != int(given):
        raise MethodError(f"{place} is {given!r}, expected a whole number")
    if given not in item.interval:
        raise MethodError(f"{place} is {given!r}, expected a number in {item.interval}")
    return int(given) if item.kind == "integer" else float(given)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False
