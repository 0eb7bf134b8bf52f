"""Which merges can be written as a PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_merge.errors import RecipeError
from ray_merge.fit.owners import is_head
from ray_merge.fit.ranked import alike, distinct
from ray_merge.methods.registry import get, gives_factors
from ray_merge.spec import Adapter, FactorEntry, Merge, SavedEntry

EXPORTED = frozenset({"linear", "conv1d", "embedding", "conv"})
"""Layouts that a plain LoRA config can describe."""


def check_export(merge: Merge, adapters: Mapping[str, Adapter]) -> None:
    """Refuse a merge whose result no plain LoRA adapter can hold.

    Raises:
        RecipeError: why, and the way out.
    """
    if merge.export == "checkpoint":
        if merge.export_rank is not None or merge.export_tolerance is not None:
            raise RecipeError(
                f"merge {merge.name!r}: export_rank and export_tolerance belong to an exported adapter; write "
                "export: adapter or export: both"
            )
        if merge.export_class is not None:
            raise RecipeError(
                f"merge {merge.name!r}: export_class belongs to an exported adapter; write export: adapter or export: "
                "both"
            )
        return
    if merge.export_rank is not None and merge.export_tolerance is not None:
        raise RecipeError(f"merge {merge.name!r}: give export_rank or export_tolerance, not both")
    method = get(merge.method)
    space = merge.parameters.get("space", method.spaces[0])
    if not gives_factors(method, space):
        options = " or ".join(f"space: {name}" for name in method.low_rank_spaces) or "another method"
        raise RecipeError(
            f"merge {merge.name!r}: {merge.method} in {space} space has no exact low-rank form, so it cannot be "
            f"exported as an adapter; use export: checkpoint, or {options}"
        )
    if not any(adapters[name].factors for name in merge.adapters):
        raise RecipeError(
            f"merge {merge.name!r}: its adapters have no factors to export; use export: checkpoint"
        )
    for adapter in distinct(adapters[name] for name in merge.adapters):
        what = _beyond_lora(adapter)
        if what:
            raise RecipeError(
                f"merge {merge.name!r}: adapter {adapter.name} has {what}, which a merged LoRA adapter cannot "
                "hold; use export: checkpoint"
            )
    _check_classes(merge, adapters)


def _beyond_lora(adapter: Adapter) -> str:
    for name, update in alike(adapter.factors).items():
        layout = adapter.layouts[name]
        if isinstance(update, SavedEntry):
            return f"a trained {adapter.modules[name]}"
        if isinstance(update, FactorEntry) and update.magnitude is not None:
            return f"a DoRA magnitude at {name}"
        if layout == "raw":
            return f"a bias on B at {name}"
        if layout not in EXPORTED:
            return f"factors of {'MoE experts' if layout == 'expert' else 'a MultiheadAttention'} at {name}"
    saved = [tensor for tensor in adapter.replaced if not is_head(tensor, adapter)]
    if saved:
        return f"a saved {saved[0]}"
    return f"trained tokens of {next(iter(adapter.tokens))}" if adapter.tokens else ""


def _check_classes(merge: Merge, adapters: Mapping[str, Adapter]) -> None:
    own = [adapters[name] for name in merge.adapters]
    kinds: dict[Any, str] = {}
    for adapter in own:
        kinds.setdefault(adapter.config.get("task_type"), adapter.name)
    if merge.export_class is not None:
        if merge.export_class not in kinds:
            raise RecipeError(
                f"merge {merge.name!r}: export_class: {merge.export_class} is the task_type of none of its adapters; "
                f"known: {', '.join(sorted(kind for kind in kinds if kind is not None)) or 'none'}"
            )
        own = [adapter for adapter in own if adapter.config.get("task_type") == merge.export_class]
    elif len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        words = " or ".join(f"export_class: {kind}" for kind in (one, other) if kind is not None)
        raise RecipeError(
            f"merge {merge.name!r}: adapter {first} has task_type {one}, adapter {second} {other}; adapters of "
            f"different model classes have no common adapter; write {words} for the class that is to load it, or use "
            "export: checkpoint"
        )
    names: dict[str, tuple[str, str]] = {}
    for adapter in distinct(own):
        for site, module in adapter.modules.items():
            before = names.setdefault(site, (adapter.name, module))
            if before[1] != module:
                raise RecipeError(
                    f"merge {merge.name!r}: {site} is {before[1]} in adapter {before[0]} and {module} "
                    f"in {adapter.name}; adapters "
                    "of different model classes have no common adapter; use export: checkpoint"
                )
