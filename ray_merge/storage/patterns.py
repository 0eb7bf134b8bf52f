r"""The keys of rank_pattern and alpha_pattern, matched to module names as PEFT does it, in bounded time.

PEFT 0.21 (`utils/other.py`, `get_pattern_key`): the first key with `re.match(rf"(.*\.)?({key})$", module)`, else
the key that equals the module. Python's own matcher tries one way after the other, so that `(a+)+$` from a hostile
adapter runs for years. Here a pattern is parsed by Python but evaluated on sets of positions, one bit each: every
way at once. Look-around, back-references and flags have no such reading and are refused; PEFT's users write none.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ray_merge.errors import AdapterError

MAX_PATTERN_CHARACTERS = 2000
"""An alternation of all layers of a deep model is some 300 characters long."""

MAX_STEPS = 5_000_000
"""About 1.5 s. Ten patterns over the 18,432 modules of a model with 128 experts in 48 layers take 3 million."""

MAX_REMEMBERED = 20_000
"""Modules whose matches are kept for the next adapter with the same patterns."""

_parser = importlib.import_module("re._parser")  # no public name since sre_parse was deprecated (Python 3.11)

_CATEGORIES: Mapping[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda c: not c.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda c: not c.isspace(),
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
    "CATEGORY_NOT_WORD": lambda c: not (c.isalnum() or c == "_"),
}


class Patterns:
    """Keys in file order, which decides where several match.

    Args:
        keys: patterns.
        where: how messages call the mapping that they are keys of.

    Raises:
        AdapterError: a key is no regular expression, or none that is matched in bounded time.
    """

    def __init__(self, keys: Iterable[str], where: str) -> None:
        self.keys = tuple(keys)
        self._where = where
        self._exact = {key: index for index, key in enumerate(self.keys)}
        self._steps_left = MAX_STEPS
        self._known = _matches(self.keys)
        self._regexes: list[tuple[int, _Step]] = []
        # length -> where the dots are -> the other characters -> position in `keys`
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        for index, key in enumerate(self.keys):
            if _is_plain(key):
                dots = _dots(key)
                self._plain.setdefault(len(key), {}).setdefault(dots, {})[_without(key, dots)] = index
            else:
                self._regexes.append((index, _checked(key, where)))

    def first(self, module: str) -> str | None:
        """The key whose value PEFT takes for `module`, None when it takes the default."""
        found = self._found(module)
        return self.keys[found[0]] if found else module if module in self._exact else None

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """The keys that no module matches."""
        used: set[int] = set()
        for module in modules:
            used.update(self._found(module))
            if module in self._exact:
                used.add(self._exact[module])
        return [key for index, key in enumerate(self.keys) if index not in used]

    def _found(self, module: str) -> list[int]:
        if module not in self._known:
            found = self._matched(module)
            if len(self._known) >= MAX_REMEMBERED:
                return found
            self._known[module] = found
        return self._known[module]

    def _matched(self, module: str) -> list[int]:
        # A key without special characters is an exact length and, its dots aside, an exact text, so it is looked up:
        # adapters with a rank of their own at every module have as many keys as modules.
        found: list[int] = []
        starts = [0, *(index + 1 for index, c in enumerate(module) if c == ".")] if self._plain else []
        for start in starts:
            shapes = self._plain.get(len(module) - start, {})
            self._steps_left -= len(shapes)
            found += [
                index
                for dots, texts in shapes.items()
                if (index := texts.get(_without(module[start:], dots))) is not None
            ]
        text = _Text(module, self._steps_left)
        try:
            found += [index for index, step in self._regexes if step(text, 1)]
        except _TooHard as error:
            raise AdapterError(
                f"{self._where} holds {len(self.keys)} patterns that take too long to match; write fewer or simpler "
                "ones"
            ) from error
        self._steps_left = text.steps_left
        return sorted(found)


@lru_cache(maxsize=16)
def _matches(keys: tuple[str, ...]) -> dict[str, list[int]]:
    """Module -> the keys that match it; the adapters of one training script have the same patterns and modules."""
    return {}


def check_pattern(key: str, where: str) -> None:
    """Refuse a key that is no regular expression, or none that is matched in bounded time.

    Args:
        key: of rank_pattern or alpha_pattern.
        where: how messages call the mapping.
    """
    if not _is_plain(key):
        _checked(key, where)


def pattern_matches(key: str, module: str) -> bool:
    """PEFT's rule for one key: a suffix of the module path, whole components only, as a regex."""
    return not Patterns([key], "the adapter").unmatched([module])


def _is_plain(key: str) -> bool:
    return re.fullmatch(r"[\w.-]+", key) is not None  # outside of brackets, - stands for itself


def _dots(key: str) -> tuple[int, ...]:
    return tuple(index for index, c in enumerate(key) if c == ".")


def _without(text: str, positions: tuple[int, ...]) -> str:
    edges = zip((-1, *positions), (*positions, len(text)), strict=True)
    return "".join(text[before + 1 : after] for before, after in edges)


# The evaluator. A set of positions in a text is an integer: bit p is set when what came before may end in front of
# character p. A step takes the positions where it may begin and gives those where it may end.


class _TooHard(Exception):
    """More than `MAX_STEPS`."""


class _Text:
    """One module name, and the steps that may still be spent on it."""

    def __init__(self, value: str, steps_left: int) -> None:
        self.length = len(value)
        self.value = value
        self.steps_left = steps_left
        self._places: dict[str, int] = {}  # character -> its positions
        for index, character in enumerate(value):
            self._places[character] = self._places.get(character, 0) | 1 << index

    def spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise _TooHard

    def places(self, accepts: Callable[[str], bool]) -> int:
        """The positions of all characters that are accepted."""
        return sum(places for character, places in self._places.items() if accepts(character))


_Step = Callable[[_Text, int], int]


def _checked(key: str, where: str) -> _Step:
    shown = f"{key[:80]!r}..." if len(key) > 80 else repr(key)
    if len(key) > MAX_PATTERN_CHARACTERS:
        raise AdapterError(
            f"{where}: {shown} is {len(key)} characters long; a pattern may have {MAX_PATTERN_CHARACTERS}"
        )
    try:
        return _compiled(key)
    except (ValueError, OverflowError, RecursionError, re.error) as error:
        raise AdapterError(f"{where}: {shown} is not a regular expression ({error})") from error
    except _Unsupported as error:
        raise AdapterError(
            f"{where}: {shown} uses {error}, which is not supported; write it without, or list the modules"
        ) from error


class _Unsupported(Exception):
    """A construct that positions alone do not describe."""


@lru_cache(maxsize=4096)
def _compiled(key: str) -> _Step:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `[[`: it may mean something else in a future Python
        tree = _parser.parse(rf"(.*\.)?({key})$")  # as PEFT uses it: `(?i)q` is valid only by itself
    return _sequence(tree)


def _sequence(items: Iterable[tuple[Any, Any]]) -> _Step:
    steps: list[_Step] = []
    letters = ""
    for operation, argument in items:
        if str(operation) == "LITERAL":
            letters += chr(argument)
            continue
        if letters:
            steps.append(_letters(letters))
            letters = ""
        steps.append(_step(str(operation), argument))
    if letters:
        steps.append(_letters(letters))

    def run(text: _Text, at: int) -> int:
        for step in steps:
            if not at:
                break
            text.spend(1)
            at = step(text, at)
        return at

    return run


def _step(operation: str, argument: Any) -> _Step:
    accepts = _accepts(operation, argument)
    if accepts is not None:
        return lambda text, at: (at & text.places(accepts)) << 1
    if operation == "AT":
        return _position(str(argument))
    if operation == "BRANCH":
        branches = [_sequence(items) for items in argument[1]]
        return lambda text, at: _union(branch(text, at) for branch in branches)
    if operation == "SUBPATTERN" and not argument[1] and not argument[2]:
        return _sequence(argument[3])
    if operation in ("MAX_REPEAT", "MIN_REPEAT"):  # greedy or not: the same texts match
        least, most, items = argument
        single = _accepts(*_one(items)) if len(items) == 1 else None
        return _repeat_one(single, least, most) if single else _repeat(_sequence(items), least, most)
    names = {
        "SUBPATTERN": "flags",
        "ASSERT": "look-around",
        "ASSERT_NOT": "look-around",
        "GROUPREF": "a back-reference",
        "GROUPREF_EXISTS": "a back-reference",
    }
    raise _Unsupported(names.get(operation, "a possessive or atomic group"))


def _one(items: Sequence[tuple[Any, Any]]) -> tuple[str, Any]:
    return str(items[0][0]), items[0][1]


def _union(sets: Iterable[int]) -> int:
    result = 0
    for positions in sets:
        result |= positions
    return result


def _letters(letters: str) -> _Step:
    def run(text: _Text, at: int) -> int:
        ends, start = 0, text.value.find(letters)
        while start >= 0:
            ends |= (at >> start & 1) << (start + len(letters))
            start = text.value.find(letters, start + 1)
        return ends

    return run


def _position(name: str) -> _Step:
    if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return lambda text, at: at & 1
    if name in ("AT_END", "AT_END_STRING"):  # names hold no line break, in front of which `$` holds too
        return lambda text, at: at & 1 << text.length
    raise _Unsupported("a word boundary")


def _repeat_one(accepts: Callable[[str], bool], least: int, most: int) -> _Step:
    def run(text: _Text, at: int) -> int:
        places = text.places(accepts)
        for _ in range(min(least, text.length + 1)):
            text.spend(1)
            at = (at & places) << 1
        if most == _parser.MAXREPEAT:
            # All ends of runs at once: the sum carries from each start to the end of its run of accepted characters.
            return ((at & places) + places ^ places) | at
        reached = at
        for _ in range(min(most - least, text.length)):
            text.spend(1)
            at = (at & places) << 1
            reached |= at
        return reached

    return run


def _repeat(body: _Step, least: int, most: int) -> _Step:
    def run(text: _Text, at: int) -> int:
        for _ in range(least):
            again = body(text, at)
            if again == at:
                break
            at = again
        reached, fresh, left = at, at, most - least
        while fresh and left:
            fresh = body(text, fresh) & ~reached
            reached |= fresh
            left -= 1
        return reached

    return run


def _accepts(operation: str, argument: Any) -> Callable[[str], bool] | None:
    """The test of a step that takes one character, None for any other step."""
    if operation == "ANY":
        return lambda c: c != "\n"
    if operation == "LITERAL":
        return lambda c: c == chr(argument)
    if operation == "NOT_LITERAL":
        return lambda c: c != chr(argument)
    if operation != "IN":
        return None
    items = [(str(kind), value) for kind, value in argument]
    negated = items[0][0] == "NEGATE"
    tests = [_in_class(kind, value) for kind, value in items[negated:]]
    return lambda c: any(test(c) for test in tests) != negated


def _in_class(kind: str, value: Any) -> Callable[[str], bool]:
    if kind == "LITERAL":
        return lambda c: ord(c) == value
    if kind == "RANGE":
        low, high = value
        return lambda c: low <= ord(c) <= high
    return _CATEGORIES[str(value)]
