"""YAML text -> plain values, remembering the line of every key, so that a refusal can point at it.

Owns the YAML dialect: keys are always text and stand once, `1e-3` is a number, only true/false are booleans
(in YAML 1.1 the adapter name `no` would be False and `010` would be 8), dates stay text. Aliases count each
time they are used, so a few lines that unfold to billions of values are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from ray_merge.errors import RecipeError, shown

MAX_RECIPE_BYTES = 4_000_000
"""A recipe of 1,000 adapters and 200 merges is some 100 kB; more is a wrong file or an attack."""

MAX_VALUES = 100_000
"""Keys and values as written, and values with aliases unfolded; a recipe of 1,000 adapters and 200 merges has some
10,000. So many take 3 s and 60 MiB."""

MAX_NAMES_SHOWN = 20

Path = tuple[str | int, ...]

_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's ideas of booleans and numbers, text for keys, and a limit to what is composed."""

    n_composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Here and not afterwards: 4 MB of `[],` would be a million nodes by then.
        self.n_composed += 1
        if self.n_composed > MAX_VALUES:
            problem = f"more than {MAX_VALUES} keys and values: not a recipe"
            raise ComposerError(None, None, problem, self.get_mark())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # As 1 and true, two adapters would be one key (True == 1); as text they are what was written.
        self.flatten_mapping(node)
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            result[key_node.value] = self.construct_object(value_node, deep=deep)
        return result

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError) as error:  # `!!int abc`, `!!bool maybe`, an integer of 5000 digits
            kind = node.tag.rpartition(":")[2]
            problem = f"{str(node.value)[:40]!r} is no {kind}"
            raise ConstructorError(None, None, problem, node.start_mark) from error


# The class gets resolvers of its own: changing the inherited table would change yaml.SafeLoader for everyone.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] not in ("bool", "int", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|nan|NaN))$"
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
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        if node is not None:
            _collect(node, (), lines, name)
        value = None if node is None else loader.construct_document(node)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{name}:{line}: not text (it holds the character {error.character:#x})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{name}:{line}: not valid YAML ({error.problem or error.context})") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RecipeError(f"{name}: not valid YAML ({reason})") from error
    return Source(name, value, lines)


def _collect(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > MAX_VALUES:
        raise RecipeError(f"{name}: more than {MAX_VALUES} values with its aliases unfolded: not a recipe")
    if node.tag not in _TAGS:
        raise RecipeError(
            f"{name}:{node.start_mark.line + 1}: tag {shown(node.tag)} has no place in a recipe"
        )
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = str(key_node.value)
            here = (*path, key)
            if here in lines:
                line = key_node.start_mark.line + 1
                raise RecipeError(
                    f"{name}:{line}: key {shown(key)} stands twice (first on line {lines[here]})"
                )
            lines[here] = key_node.start_mark.line + 1
            _collect(value_node, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect(item, (*path, index), lines, name)


def plain_data(recipe: Mapping[str, Any]) -> Any:
    """What the same recipe would be in YAML: tuples, paths and numpy numbers become plain values."""
    try:
        return json.loads(json.dumps(recipe, default=lambda v: v.item() if hasattr(v, "item") else str(v)))
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe: not plain data ({error})") from error


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, else the list of what is known."""
    match = get_close_matches(word[:100], known, n=1, cutoff=0.6)
    if match:
        return f"; did you mean {match[0]!r}?"
    more = ", ..." if len(known) > MAX_NAMES_SHOWN else ""
    return f"; known: {', '.join(sorted(known)[:MAX_NAMES_SHOWN])}{more}"
