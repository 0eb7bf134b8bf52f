"""What pydantic found wrong in a recipe, as one sentence with file, line and nearest key."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from pydantic import ValidationError

from ray_merge.errors import redacted, shown
from ray_merge.recipe.source import Source, nearest

Location = tuple[str | int, ...]
"""Keys and indices from the recipe's top to a value."""


def describe(
    error: ValidationError, source: Source, known_keys: Callable[[Location], Collection[str]]
) -> str:
    """One sentence for the first problem, in file order, and how many more there are.

    Args:
        error: what pydantic found.
        source: the document that it looked at.
        known_keys: the keys that a mapping at that path may have.
    """
    # A misspelt key is also a missing one, and only the former knows its line and what it should have been.
    problems = sorted(
        error.errors(include_url=False),
        key=lambda p: (p["type"] == "missing", source.lines.get(_plain(p["loc"], source), 0)),
    )
    first = problems[0]
    path = _plain(first["loc"], source)
    place = f"{source.where(path)}: {_dotted(path)}" if path else source.name
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(known_keys(path[:-1]))
        return f"{source.where(path)}: unknown key {shown(path[-1])}{nearest(str(path[-1]), known)}{more}"
    if first["type"] == "missing":
        return f"{source.where(path[:-1])}: {_dotted(path)} is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping", message)
    given = "" if first["type"] == "value_error" else f", got {redacted(repr(first['input']))[:80]}"
    return f"{place}: {message[0].lower()}{message[1:]}{given}{more}"


def _plain(location: Location, source: Source) -> Location:
    # pydantic puts names of union members and "[key]" into the location; keep what stands in the document.
    path: list[str | int] = []
    value: Any = source.value
    for index, part in enumerate(location):
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if in_list or (isinstance(value, dict) and part in value):
            value = value[part]
        elif index < len(location) - 1 or part == "[key]" or not isinstance(value, dict):
            continue
        path.append(part)
    return tuple(path)


def _dotted(path: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
