"""`export_class`: the names that an exported adapter has where its inputs were trained in different model classes.

Sites that an adapter of that class touches are called as it calls them; for the others the class itself is asked, built
without weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_merge.errors import RecipeError, Refusal
from ray_merge.fit.ranked import distinct
from ray_merge.spec import Adapter, Merge, Site
from ray_merge.storage.checkpoint import Checkpoint


def leading(merge: Merge, adapters: Mapping[str, Adapter]) -> Adapter:
    """The adapter whose model class an exported adapter is for: the first of `export_class`, else the first."""
    own = [adapters[name] for name in merge.adapters]
    return next((one for one in own if merge.export_class in (None, one.config.get("task_type"))), own[0])


def export_names(
    base: Checkpoint, adapters: Mapping[str, Adapter], sites: Mapping[str, Site], merges: Sequence[Merge]
) -> dict[str, Mapping[str, str]]:
    """Name of each exported merge with `export_class` -> site -> runtime name of its module in that class.

    Args:
        base: headers of the base.
        adapters: fitted to it.
        sites: by name.
        merges: all of the plan, each checked by plan/export.py.

    Raises:
        Refusal: a site that the class does not have, or a class that transformers cannot build.
    """
    classes: dict[str, tuple[str, Mapping[str, str]]] = {}
    found: dict[str, Mapping[str, str]] = {}
    for merge in merges:
        if merge.export_class is None:
            continue
        own = distinct(adapters[name] for name in merge.adapters)
        of_class = [one for one in own if one.config.get("task_type") == merge.export_class]
        names = {site: module for one in reversed(of_class) for site, module in one.modules.items()}
        for one in own:
            for site in one.modules:
                if site not in names:
                    key = of_class[0].name
                    if key not in classes:
                        classes[key] = _modules(base, of_class[0], merge)
                    names[site] = _named(merge, one, sites[site], *classes[key])
        found[merge.name] = names
    return found


def _named(merge: Merge, adapter: Adapter, site: Site, class_name: str, modules: Mapping[str, str]) -> str:
    if site.tensor not in modules:
        raise RecipeError(
            f"merge {merge.name!r}: export_class: {merge.export_class}: adapter {adapter.name} changes {site.tensor}, "
            f"which {class_name} does not have; write the other export_class, or use export: checkpoint"
        )
    return modules[site.tensor]


def _modules(base: Checkpoint, adapter: Adapter, merge: Merge) -> tuple[str, Mapping[str, str]]:
    """The class that an adapter was trained in, and disk name of a weight -> its module there."""
    from ray_merge.models.model_class import class_candidates
    from ray_merge.models.skeleton import build_skeleton

    auto = adapter.config.get("auto_mapping")
    named: Any = auto.get("base_model_class") if isinstance(auto, Mapping) else None
    shapes = {tensor: entry.shape for tensor, entry in base.tensors.items()}
    why = f"transformers has no class for model_type {base.config.get('model_type')!r}"
    for name in class_candidates(
        base.config, class_name=named if isinstance(named, str) else None, task_type=merge.export_class
    ):
        try:
            skeleton = build_skeleton(base.config, shapes, name=name)
        except Refusal as error:
            why = str(error)
            continue
        paths = {path for path, _ in skeleton.model.named_modules()}
        if all(module in paths for module in adapter.modules.values()):
            found: dict[str, str] = {}
            for parameter, slots in skeleton.slots.items():
                if len(slots) == 1:  # of tied names the first: the embedding, not the head
                    found.setdefault(slots[0].tensor, parameter.rpartition(".")[0])
            return name, found
        why = f"{name} does not have all modules of adapter {adapter.name}"
    raise RecipeError(
        f"merge {merge.name!r}: export_class: {merge.export_class}: the modules of the other adapters cannot be named "
        f"in that class ({why}); use export: checkpoint"
    )
