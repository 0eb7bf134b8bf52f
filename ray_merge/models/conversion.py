"""Disk tensors -> runtime parameters of one transformers model, by transformers' own rules for loading.

transformers 5 renames, stacks experts and joins gate with up while it loads (`conversion_mapping.py`); version 4
renames with regular expressions of the class. Both add or cut the base-model prefix. What is a rename, a stack
of experts or a concatenation is described by slots; every other operation is reported, never guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

KEEPS_VALUES = frozenset({"Force16BytesAlignment"})
"""Operations that move a tensor in memory only (transformers 5.0, gpt-oss)."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One disk tensor that is (part of) a runtime parameter.

    Args:
        tensor: disk name.
        expert: index along axis 0 of the runtime parameter; None: not an expert stack.
        rows: start and end on the axis that was concatenated; None: nothing was.
        axis: which axis `rows` cuts, counted after the expert axis is taken away.
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Disk tensors that become one runtime parameter.

    Args:
        target: its name.
        parts: disk names by pattern, in the order in which patterns are joined.
        operations: what is done to them; empty for a rename.
        others: more parameters that come out of the same tensors.
    """

    target: str
    parts: tuple[tuple[str, ...], ...]
    operations: tuple[Any, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(slots=True)
class Conversion:
    """What became of every disk tensor; parameters and persistent buffers by their runtime names."""

    slots: dict[str, tuple[Slot, ...]] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def convert(model: Any, tensors: Shapes) -> Conversion:
    """Where every disk tensor goes.

    Args:
        model: a transformers model; the meta device will do.
        tensors: disk name -> shape.
    """
    targets = {name: tuple(v.shape) for name, v in model.state_dict().items() if hasattr(v, "shape")}
    result = Conversion()
    for group in loaded_groups(model, list(tensors)):
        names = [name for part in group.parts for name in part]
        if group.target not in targets:
            result.unused += names
            continue
        slots, why = _slots(group, tensors, targets[group.target])
        if why:
            result.unsupported |= dict.fromkeys((group.target, *group.others), why)
        else:
            result.slots[group.target] = slots
    order = {name: position for position, name in enumerate(targets)}
    result.slots = {name: result.slots[name] for name in sorted(result.slots, key=order.__getitem__)}
    return result


def loaded_groups(model: Any, names: Sequence[str]) -> Iterator[Group]:
    """Disk names in the groups that the installed transformers makes of them when it loads this model."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4
        return _groups_4(model, names)
    return _groups_5(model, names, get_model_conversion_mapping(model))


def saved_names(model: Any, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """(name that transformers 5 writes, runtime name) of parameters that are only renamed; nothing in version 4.

    These are the names that the class had before it was renamed, whatever the base at hand uses.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return
    state = {name: value for name, value in model.state_dict().items() if name in names}
    origin = {id(value): name for name, value in state.items()}
    # None: as a model made from scratch is saved, without changes of prefix; the mapping: with them.
    for conversions in (None, get_model_conversion_mapping(model, add_legacy=False)):
        model._weight_conversions = conversions
        try:
            saved = revert_weight_conversion(model, state)
        except (ValueError, RuntimeError, KeyError):  # a conversion that cannot go back: no older names then
            continue
        for name, value in saved.items():
            if id(value) in origin:
                yield name, origin[id(value)]


def _groups_5(model: Any, names: Sequence[str], transforms: Sequence[Any]) -> Iterator[Group]:
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    targets, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings act only after they saw another name
        target, pattern = rename_source_key(name, renamings, converters, prefix, targets)
        if target not in targets and name in targets:
            target, pattern = rename_source_key(name, [], [], prefix, targets)
        found.setdefault(target, {}).setdefault(pattern, []).append(name)
    for target, parts in found.items():
        converter = next((by_pattern[pattern] for pattern in parts if pattern is not None), None)
        if converter is None:
            yield Group(target, tuple(map(tuple, parts.values())))
            continue
        head, *tail = converter.target_patterns
        patterns = sorted(parts, key=lambda one: _position(one, converter.source_patterns))
        yield Group(
            target,
            tuple(tuple(parts[pattern]) for pattern in patterns),
            tuple(converter.operations),
            tuple(target.replace(head, pattern) for pattern in tail),
        )


def _position(pattern: str | None, patterns: Sequence[str]) -> int:
    return patterns.index(pattern) if pattern in patterns else len(patterns)


def _groups_4(model: Any, names: Sequence[str]) -> Iterator[Group]:
    from transformers import modeling_utils

    prefix = model.base_model_prefix
    has_prefix = bool(prefix) and any(name.startswith(prefix) for name in names)
    expects_prefix = bool(prefix) and hasattr(model, prefix)
    # Only classes with one of these words in their name (or in their parents') rename; modeling_utils says so.
    words = getattr(modeling_utils, "VLMS", ())
    parents = [parent.__name__.lower() for parent in type(model).__mro__[:-1]]
    renames = any(word in parent for parent in parents for word in words)
    try:
        targets = model._get_key_renaming_mapping(
            list(names),
            model._checkpoint_conversion_mapping if renames else None,
            has_prefix and not expects_prefix,
            expects_prefix and not has_prefix,
        )
    except ValueError:  # a task head beside base-model names without prefix: transformers refuses to load it
        targets = {}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(targets.get(name, name), []).append(name)
    for target, group in found.items():
        yield Group(target, (tuple(group),))


def _slots(group: Group, shapes: Shapes, want: tuple[int, ...]) -> tuple[tuple[Slot, ...], str]:
    """The slots of a group, or words why it has none."""
    names = [name for part in group.parts for name in part]
    operations = tuple(one for one in group.operations if type(one).__name__ not in KEEPS_VALUES)
    if len(names) == 1 and shapes[names[0]] == want and [*map(_checks_first, operations)] == [True]:
        operations = ()
    layout = _layout(operations)
    if layout is None or group.others:
        kinds = ", ".join(type(one).__name__ for one in operations)
        return (), f"disk tensors pass through {kinds}, which is not a rename or expert stacking"
    stacked, axis = layout
    if stacked and len({len(part) for part in group.parts}) != 1:
        return (), f"its patterns match {[len(part) for part in group.parts]} disk tensors, not equally many"
    columns = list(zip(*group.parts, strict=True)) if stacked else [tuple(names)]
    if axis is None and len(columns[0]) != 1:
        return (), f"several disk tensors claim it: {', '.join(sorted(names)[:3])}"
    slots: list[Slot] = []
    made: set[tuple[int, ...] | None] = set()
    for position, column in enumerate(columns):
        expert = position if stacked else None
        if axis is None:
            slots.append(Slot(column[0], expert))
            made.add(shapes[column[0]])
            continue
        ends = list(accumulate((shapes[name][axis] for name in column), initial=0))
        slots += [Slot(name, expert, rows, axis) for name, rows in zip(column, pairwise(ends), strict=True)]
        made.add(_joined([shapes[name] for name in column], axis))
    one = made.pop()
    got = (len(columns), *one) if stacked and one is not None else one
    if made or got != want:
        return (), f"disk tensors make {'no one shape' if made or got is None else got}, the class has {want}"
    return tuple(slots), ""


def _layout(operations: Sequence[Any]) -> tuple[bool, int | None] | None:
    """(whether experts are stacked on axis 0, the axis that is concatenated); None for any other operation."""
    names = [type(one).__name__ for one in operations]
    stacked = names[:1] == ["MergeModulelist"] and operations[0].dim == 0
    if not names[stacked:]:
        return stacked, None
    axis: int = operations[-1].dim - stacked if names[stacked:] == ["Concatenate"] else -1
    return (stacked, axis) if axis in (0, 1) else None


def _checks_first(operation: Any) -> bool:
    """Whether it is a transposition that leaves alone what fits already."""
    return type(operation).__name__ == "Transpose" and bool(getattr(operation, "check_dims", False))


def _joined(shapes: Sequence[tuple[int, ...]], axis: int) -> tuple[int, ...] | None:
    """The shape of these laid end to end; None if the other axes differ."""
    first = shapes[0]
    if {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes} != {(*first[:axis], *first[axis + 1 :])}:
        return None
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])
