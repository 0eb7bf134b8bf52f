"""YAML text -> plain values, remembering the line of every key, so that a refusal can point at it.

Owns the YAML dialect: duplicate keys are an error, `1e-3` is a number, only true/false are booleans (in YAML
1.1 the adapter name `no` would be False), dates stay text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import yaml

from ray_merge.errors import RecipeError

MAX_RECIPE_BYTES = 4_000_000
"""A recipe of 1,000 adapters and 200 merges is some 100 kB; more is a wrong file or an attack."""

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's ideas of booleans and floats."""


# The class gets resolvers of its own: changing the inherited table would change yaml.SafeLoader for everyone.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] not in ("bool", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|nan|NaN))$"
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed YAML document: `value`, and the 1-based line of each path."""

    name: str
    value: Any
    lines: Mapping[Path, int]

    def where(self, path: Sequence[str | int]) -> str:
        """`file:line` of the path, or of its nearest parent that stands in the file."""
        location = tuple(path)
        while location and location not in self.lines:
            location = location[:-1]
        line = self.lines.get(location)
        return self.name if line is None else f"{self.name}:{line}"


def parse_yaml(text: str, name: str) -> Source:
    """Parse one YAML document.

    Args:
        text: the document.
        name: what messages call it, usually the file name.

    Raises:
        RecipeError: no valid YAML, more than one document, a key that stands twice, too large.
    """
    if len(text) > MAX_RECIPE_BYTES:
        raise RecipeError(
            f"{name} is {len(text)} characters long, more than {MAX_RECIPE_BYTES}: not a recipe"
        )
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        if node is not None:
            _collect(node, (), lines, name)
        value = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{name}:{line}: not valid YAML ({error.problem or error.context})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{name}: not valid YAML ({error})") from error
    finally:
        loader.dispose()
    return Source(name, value, lines)


def _collect(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = str(key_node.value)
            here = (*path, key)
            if here in lines:
                line = key_node.start_mark.line + 1
                raise RecipeError(f"{name}:{line}: key {key!r} stands twice (first on line {lines[here]})")
            lines[here] = key_node.start_mark.line + 1
            _collect(value_node, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect(item, (*path, index), lines, name)


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, else the list of what is known."""
    match = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(sorted(known))}"
