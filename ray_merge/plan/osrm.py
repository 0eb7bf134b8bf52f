"""Which adapters `init` writes: for each task its sites, what the class that is fine-tuned calls them, and the others.

Owns: every refusal of an init that headers can show. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_merge.errors import RayMergeError, RecipeError
from ray_merge.fit.resolver import Architectures
from ray_merge.models.architecture import Architecture
from ray_merge.models.conversion import Slot
from ray_merge.plan.moments import MomentsPlan
from ray_merge.plan.task_heads import TASK_TYPES
from ray_merge.recipe import Recipe
from ray_merge.recipe.model import Init
from ray_merge.spec import Adapter, FactorEntry, TensorEntry
from ray_merge.storage.checkpoint import Checkpoint

LINEAR_KINDS = ("linear", "conv1d")


@dataclass(frozen=True, slots=True)
class OsrmSite:
    """One site of an adapter that is written.

    Args:
        site: its name.
        module: runtime path of its module in the class that is fine-tuned.
        n_inputs: I.
        n_outputs: O.
        conv1d: its weight is stored (in, out); PEFT's factors are (r, in) and (out, r) all the same.
    """

    site: str
    module: str
    n_inputs: int
    n_outputs: int
    conv1d: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OsrmTask:
    """One adapter that is written.

    Args:
        name: the recipe's.
        others: the tasks whose inputs it stays clear of, in the recipe's order.
        class_name: the transformers class whose names it has.
        task_type: of PEFT; None where the recipe does not say.
        targets: target_modules that mean its sites and no other module of that class.
        parts: part of the moments (plan/moments.py) -> its sites there, in order.
        heads: saved heads of an adapter that is projected; they go along.
        modules_to_save: of that adapter's config.
    """

    name: str
    others: tuple[str, ...]
    class_name: str
    task_type: str | None
    targets: tuple[str, ...]
    parts: Mapping[str, tuple[OsrmSite, ...]]
    heads: tuple[TensorEntry, ...] = ()
    modules_to_save: tuple[str, ...] = field(default=())

    @property
    def sites(self) -> tuple[OsrmSite, ...]:
        """All of them, in order."""
        return tuple(site for sites in self.parts.values() for site in sites)


def required_init(recipe: Recipe) -> Init:
    """The recipe's `init`.

    Raises:
        RecipeError: it has none, or its output cannot be a folder of adapters.
    """
    if recipe.init is None:
        raise RecipeError(
            "the recipe has no init; add `init: {method: osrm, r: 16, target_modules: [...], output: URL}`"
        )
    if "{" in recipe.init.output or "}" in recipe.init.output:
        raise RecipeError(
            f"init.output {recipe.init.output!r}: braces mean nothing here; write the folder itself"
        )
    return recipe.init


def other_tasks(recipe: Recipe, init: Init) -> dict[str, tuple[str, ...]]:
    """Every task -> the others whose moments it stays clear of, in the recipe's order.

    Raises:
        RecipeError: a task has no other one, or one that is to be projected has no adapter.
    """
    names = list(recipe.adapters)
    allowed = names if init.others is None else [name for name in names if name in init.others]
    found = {name: tuple(other for other in allowed if other != name) for name in names}
    alone = next((name for name, others in found.items() if not others), None)
    if alone is not None or not found:
        key = "init.others" if init.others is not None else "adapters"
        raise RecipeError(
            f"{key}: OSRM starts a task clear of the inputs of other tasks, and {alone or 'the recipe'} has no other "
            "one; add a task with data"
        )
    bare = next((name for name in names if init.project and recipe.adapters[name].path is None), None)
    if bare is not None:
        raise RecipeError(
            f"init.project: adapter {bare} has no path, so there is nothing to project; give its folder, or leave "
            "project out"
        )
    return found


def plan_osrm(
    recipe: Recipe, base: Checkpoint, adapters: Mapping[str, Adapter], moments: MomentsPlan
) -> tuple[OsrmTask, ...]:
    """What is written for each task.

    Args:
        recipe: with an init.
        base: headers of the base.
        adapters: those of the recipe that have a path, fitted to the base.
        moments: which sites are watched, and by which parts.

    Raises:
        Refusal: a target that the class of a task lacks, a rank above a site's inputs, an adapter that cannot be
            projected.
    """
    init = required_init(recipe)
    others, classes = other_tasks(recipe, init), Architectures(base)
    tasks = []
    for name in recipe.adapters:
        kind = _task_type(recipe, name, adapters.get(name), base)
        known = _class(recipe, name, adapters.get(name), kind, classes)
        own = adapters[name] if init.project else None
        modules = _projected(own, init, moments) if own else _targeted(name, known, init, moments)
        parts = _parts(base, moments, modules)
        _check_rank(name, init, parts)
        tasks.append(
            OsrmTask(
                name=name,
                others=others[name],
                class_name=known.name,
                task_type=kind,
                targets=_target_modules(known, init, list(modules.values())),
                parts=parts,
                heads=own.heads if own else (),
                modules_to_save=tuple((own.config.get("modules_to_save") or ()) if own else ()),
            )
        )
    return tuple(tasks)


def _task_type(recipe: Recipe, name: str, adapter: Adapter | None, base: Checkpoint) -> str | None:
    said = recipe.adapters[name].task
    if said is None:
        found = adapter.config.get("task_type") if adapter else None
        return found if isinstance(found, str) else None
    if said == "generation" and base.config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    return TASK_TYPES.get(said, said)


def _class(
    recipe: Recipe, name: str, adapter: Adapter | None, task_type: str | None, classes: Architectures
) -> Architecture:
    """The class that is fine-tuned: what the recipe calls the task, else as its adapter says, else the base's own.

    That of an adapter which is projected is the first guess that has all of its modules.
    """
    project = required_init(recipe).project
    auto: Any = adapter.config.get("auto_mapping") if adapter else None
    named = auto.get("base_model_class") if isinstance(auto, Mapping) else None
    told = recipe.adapters[name].task is not None and not project
    modules = adapter.modules.values() if adapter and project else ()
    found = list(classes.candidates(named if isinstance(named, str) and not told else "", task_type or ""))
    built = [one for one in found if not isinstance(one, RayMergeError)]
    if not built:
        raise next(one for one in found if isinstance(one, RayMergeError))
    return next((one for one in built if all(module in one.kinds for module in modules)), built[0])


def _targeted(name: str, known: Architecture, init: Init, moments: MomentsPlan) -> dict[str, str]:
    """Watched site -> its module in the class of a task, for the modules that `target_modules` name."""
    watched = {_tensor(moments.base, site): site for part in moments.parts for site in part.modules}
    found: dict[str, str] = {}
    for target in init.target_modules:
        before = len(found)
        for path in [path for path in known.kinds if _matches(path, target)]:
            parameter = known.tied.get(f"{path}.weight", f"{path}.weight")
            slots = known.slots.get(parameter, ())
            site = watched.get(slots[0].tensor) if slots and slots == (Slot(slots[0].tensor),) else None
            if site is not None and known.kinds[path] in LINEAR_KINDS:
                found.setdefault(site, path)
        if len(found) == before and not any(_matches(path, target) for path in found.values()):
            raise RecipeError(
                f"init.target_modules: {target!r} names no linear layer of {known.name}, which adapter {name} is "
                f"trained in, that {moments.class_name} has as well; its linear layers are called {_leaves(known)}"
            )
    return found


def _matches(path: str, target: str) -> bool:
    """As PEFT matches an item of target_modules."""
    return path == target or path.endswith(f".{target}")


def _leaves(known: Architecture) -> str:
    paths = [path for path, kind in known.kinds.items() if kind in LINEAR_KINDS]
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))


def _projected(adapter: Adapter, init: Init, moments: MomentsPlan) -> dict[str, str]:
    """Site -> module of an adapter that is trained already.

    Raises:
        RecipeError: a part of it cannot be written as factors on OSRM's rows, or is not asked for.
    """
    watched = {site for part in moments.parts for site in part.modules}
    for site in adapter.factors:
        why = _unprojected(adapter, site, init, moments, watched)
        if why:
            raise RecipeError(f"init.project: adapter {adapter.name} has {site}, and {why}")
    odd = next(iter([*adapter.replaced, *adapter.tokens]), None)
    if odd is not None or not adapter.factors:
        raise RecipeError(
            f"init.project: adapter {adapter.name} {'replaces ' + odd if odd else 'has no factors'}, which cannot be "
            "projected; leave it out"
        )
    return dict(adapter.modules)


def _unprojected(
    adapter: Adapter, site: str, init: Init, moments: MomentsPlan, watched: Collection[str]
) -> str:
    """Why the update at a site cannot be written on OSRM's rows, and what to do; "" where it can."""
    update = adapter.factors[site]
    if not isinstance(update, FactorEntry):
        return "its update there is no product of two factors; leave the adapter out"
    if update.magnitude is not None:
        return "it is DoRA there, whose update depends on the base weight; leave the adapter out"
    if site not in watched:
        why = moments.unwatched.get(site, "the inputs of that module are not watched")
        return f"{why}; leave the adapter out"
    if not any(_matches(adapter.modules[site], target) for target in init.target_modules):
        return "init.target_modules does not name it; name it there, or leave the adapter out"
    return ""


def _parts(
    base: Checkpoint, moments: MomentsPlan, modules: Mapping[str, str]
) -> dict[str, tuple[OsrmSite, ...]]:
    parts = {}
    for part in moments.parts:
        sites = tuple(
            _site(base, site, modules[site], site in moments.conv1d)
            for site in part.modules
            if site in modules
        )
        if sites:
            parts[part.name] = sites
    return parts


def _site(base: Checkpoint, site: str, module: str, conv1d: bool) -> OsrmSite:
    rows, columns = base.tensors[_tensor(base, site)].shape
    n_inputs, n_outputs = (rows, columns) if conv1d else (columns, rows)
    return OsrmSite(site, module, n_inputs, n_outputs, conv1d)


def _tensor(base: Checkpoint, site: str) -> str:
    return site if site in base.tensors else f"{site}.weight"


def _check_rank(name: str, init: Init, parts: Mapping[str, Sequence[OsrmSite]]) -> None:
    narrow = min((site for sites in parts.values() for site in sites), key=lambda site: site.n_inputs)
    if init.r > narrow.n_inputs:
        raise RecipeError(
            f"init.r: {init.r} orthonormal rows do not fit the {narrow.n_inputs} inputs of {narrow.site} (adapter "
            f"{name}); use an r of at most {narrow.n_inputs}"
        )


def _target_modules(known: Architecture, init: Init, modules: Sequence[str]) -> tuple[str, ...]:
    """The recipe's words where PEFT takes them for these modules and no others, else whole names."""
    taken = [path for path in known.kinds if any(_matches(path, target) for target in init.target_modules)]
    return tuple(init.target_modules if sorted(taken) == sorted(modules) else sorted(modules))
