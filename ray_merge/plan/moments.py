"""Which moments a recipe needs: tasks with data, sites to watch, and the stages that the base is cut into.

Owns the parts that moments are computed, stored and named by: one block of the base, or one site outside of the
blocks. Parts depend on the base and the sites alone, never on how many stages there are, so moments that were
computed in three stages serve a run in thirty. Reads headers only; transformers builds the base on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_merge.errors import RecipeError
from ray_merge.models.blocks import natural_key
from ray_merge.plan.stages import (
    HANDED_COPIES,
    STAGE_RUNTIME_BYTES,
    block_bytes,
    cut,
    handed_bytes,
    passing_bytes,
)
from ray_merge.recipe import Calibration, DataSource, Recipe
from ray_merge.spec import Adapter, Site
from ray_merge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ray_merge.models.conversion import Slot
    from ray_merge.models.skeleton import Skeleton

WATCHED_LAYOUTS = ("linear", "conv1d")
"""Layouts whose module is called with one row of inputs for each token."""


@dataclass(frozen=True, slots=True)
class TaskData:
    """A task whose inputs are looked at.

    Args:
        name: the recipe's name of it.
        data: where its inputs are.
        adapter: its own adapter, where that is active while its inputs run through the model; else None.
    """

    name: str
    data: DataSource
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What moments are stored by: the watched sites of one block, or one site outside of the blocks.

    Args:
        name: path of the block (`model.layers.3`), or the site's.
        block: its number; None outside of the blocks.
        modules: site -> path of its module in the model class.
    """

    name: str
    block: int | None
    modules: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentsPlan:
    """Everything that computing moments needs to know, small enough to send to every worker.

    Args:
        base: headers of the base.
        class_name: the transformers class that is run.
        tasks: in recipe order.
        parts: in order of blocks, then the sites outside.
        stages: first block and last + 1 of each stage; one stage of (0, 0) runs a model without blocks.
        conv1d: the sites whose weight is stored (in, out).
        unwatched: site -> why it has no moments.
        unmasked: paths of modules whose rows are no tokens, so that all of them count.
        calibration: which inputs, and how.
        handed_bytes: that one task's hidden states take between two stages, at most.
        peak_bytes: estimated resident bytes of the largest stage.
    """

    base: Checkpoint
    class_name: str
    tasks: tuple[TaskData, ...]
    parts: tuple[Part, ...]
    stages: tuple[tuple[int, int], ...]
    conv1d: frozenset[str]
    unwatched: Mapping[str, str]
    unmasked: frozenset[str]
    calibration: Calibration
    handed_bytes: int
    peak_bytes: int

    def parts_of(self, stage: int) -> tuple[Part, ...]:
        """The parts that a stage may make; sites outside of the blocks run in the first or in the last one."""
        first, stop = self.stages[stage]
        ends = stage in (0, len(self.stages) - 1)
        return tuple(
            part for part in self.parts if (ends if part.block is None else first <= part.block < stop)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """What a computation of moments takes, for whoever reads a plan.

    Args:
        kind: "gram", or "fisher/" and whose labels.
        class_name: of the model that is run.
        tasks: how many.
        parts: of the base that moments are made of.
        stages: how many.
        peak_bytes: estimated resident bytes of the largest stage.
        handed_bytes: that one task's hidden states take between two stages, at most.
    """

    kind: str
    class_name: str
    tasks: int
    parts: int
    stages: int
    peak_bytes: int
    handed_bytes: int


def stage_facts(kind: str, plan: MomentsPlan) -> StageFacts:
    """The facts of one plan."""
    return StageFacts(
        kind=kind,
        class_name=plan.class_name,
        tasks=len(plan.tasks),
        parts=len(plan.parts),
        stages=len(plan.stages),
        peak_bytes=plan.peak_bytes,
        handed_bytes=plan.handed_bytes,
    )


def tasks_with_data(recipe: Recipe, names: Sequence[str], why: str) -> list[TaskData]:
    """The tasks called `names`, all of which must have data.

    Raises:
        RecipeError: one has none; `why` says what needs it.
    """
    missing = [name for name in names if recipe.adapters[name].data is None]
    if missing:
        raise RecipeError(
            f"adapters.{missing[0]} has no data, which {why} needs; add `data: URL` with unlabelled inputs "
            f"({len(missing)} of {len(names)} task(s) have none)"
        )
    return [TaskData(name, data) for name in names if (data := recipe.adapters[name].data) is not None]


def plan_moments(
    recipe: Recipe,
    base: Checkpoint,
    tasks: Sequence[TaskData],
    sites: Mapping[str, Site],
    targets: Sequence[str] = (),
    *,
    memory_bytes: int | None = None,
    workers: int = 1,
    site_bytes: Mapping[str, int] | None = None,
) -> MomentsPlan:
    """Lay out the computation of moments.

    Args:
        recipe: the validated recipe; `stages` and `calibration` are read.
        base: headers of the base.
        tasks: that have data.
        sites: to be watched, by name.
        targets: names of modules to be watched besides, as PEFT's target_modules: whole names or their ends.
        memory_bytes: ceiling for one stage, where `stages` is not given; None for no ceiling.
        workers: that could hold a stage each.
        site_bytes: that are held for each site in place of its moments, where something else is computed.

    Raises:
        Refusal: the model cannot be cut or built, a target names no linear layer, a ceiling cannot be kept.
    """
    from ray_merge.models.skeleton import build_skeleton

    skeleton = build_skeleton(base.config, {name: entry.shape for name, entry in base.tensors.items()})
    layers = _layers(skeleton)
    watched, unwatched = _modules(skeleton, layers, sites)
    watched |= dict(_targets(skeleton, layers, base, targets))
    calibration = recipe.calibration or Calibration()
    parts = tuple(_parts(skeleton, watched))
    handed = handed_bytes(base.config, calibration) if skeleton.blocks else 0
    # What comes in is held while what goes out grows; Ray's copies of both are shared with other processes.
    held = STAGE_RUNTIME_BYTES + HANDED_COPIES * handed + passing_bytes(skeleton, layers, calibration)
    room = None if memory_bytes is None else max(1, memory_bytes - held)
    sizes = block_bytes(skeleton, base, parts, calibration, site_bytes)
    stages, stage_bytes = cut(skeleton, base, sizes, recipe.stages, room, workers)
    return MomentsPlan(
        base=base,
        class_name=skeleton.name,
        tasks=tuple(tasks),
        parts=parts,
        stages=stages,
        conv1d=frozenset(site for site, path in watched.items() if layers[path]),
        unwatched=unwatched,
        unmasked=_beside_text(skeleton) & set(watched.values()),
        calibration=calibration,
        handed_bytes=handed,
        peak_bytes=held + stage_bytes,
    )


def _layers(skeleton: Skeleton) -> dict[str, bool]:
    """Path of every module that takes one row of inputs for each token -> whether its weight is stored (in, out)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {
        path: isinstance(module, Conv1D)
        for path, module in skeleton.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def _modules(
    skeleton: Skeleton, layers: Mapping[str, bool], sites: Mapping[str, Site]
) -> tuple[dict[str, str], dict[str, str]]:
    """Site -> module, and why a site has no module with rows of inputs."""
    plain: dict[str, list[str]] = {}
    for name, slots in skeleton.slots.items():
        if _is_plain(slots):
            plain.setdefault(slots[0].tensor, []).append(name)
    watched: dict[str, str] = {}
    unwatched: dict[str, str] = {}
    for name, site in sites.items():
        names = plain.get(site.tensor, [""])
        path, _, leaf = names[0].rpartition(".")
        linear = [one for one in names if one.rpartition(".")[0] in layers]
        if len(linear) > 1:
            unwatched[name] = f"{site.tensor} is the weight of {len(linear)} layers of {skeleton.name}"
            continue
        is_whole = leaf == "weight" and path in layers and site.layout in WATCHED_LAYOUTS and not site.start
        if is_whole and "[" not in name:
            watched[name] = path
        else:
            unwatched[name] = (
                f"{site.tensor} is no linear layer of {skeleton.name} that is called with inputs"
            )
    return watched, unwatched


def _beside_text(skeleton: Skeleton) -> frozenset[str]:
    """Modules of a vision-language model that stand before its blocks: tower and projector see parts of images."""
    config = skeleton.model.config
    if (
        skeleton.blocks is None
        or getattr(config, "vision_config", None) is None
        or not hasattr(config, "text_config")
    ):
        return frozenset()
    paths = [path for path, _ in skeleton.model.named_modules()]
    return frozenset(paths[: paths.index(skeleton.blocks.path)])


def _is_plain(slots: Sequence[Slot]) -> bool:
    return len(slots) == 1 and slots[0].rows is None and slots[0].expert is None


def _targets(
    skeleton: Skeleton, layers: Mapping[str, bool], base: Checkpoint, targets: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """The sites of the modules that `targets` name, as PEFT matches them."""
    for target in targets:
        found = [path for path in layers if path == target or path.endswith(f".{target}")]
        if not found:
            leaves = sorted({path.rpartition(".")[2] for path in layers})
            raise RecipeError(
                f"init.target_modules: {target!r} names no linear layer of {skeleton.name} in {base.url}; its linear "
                f"layers are called {', '.join(leaves)}"
            )
        for path in found:
            slots = skeleton.slots.get(f"{path}.weight", ())
            if not _is_plain(slots):
                raise RecipeError(
                    f"init.target_modules: {target!r}: {path}.weight is not one tensor in {base.url}; name other "
                    "modules"
                )
            shared = [
                name for name, other in skeleton.slots.items() if other == slots and name.endswith(".weight")
            ]
            if sum(name.removesuffix(".weight") in layers for name in shared) > 1:
                raise RecipeError(
                    f"init.target_modules: {target!r}: {slots[0].tensor} is the weight of several layers of "
                    f"{skeleton.name}, whose inputs cannot be told apart; name other modules"
                )
            yield slots[0].tensor.removesuffix(".weight"), path


def _parts(skeleton: Skeleton, watched: Mapping[str, str]) -> Iterator[Part]:
    by_block: dict[int, dict[str, str]] = {}
    outside: dict[str, str] = {}
    for site, path in sorted(watched.items(), key=lambda item: natural_key(item[0])):
        block = skeleton.blocks.block_of(path) if skeleton.blocks else None
        (outside if block is None else by_block.setdefault(block, {}))[site] = path
    for block, modules in sorted(by_block.items()):
        assert skeleton.blocks is not None
        yield Part(f"{skeleton.blocks.path}.{block}", block, modules)
    for site, path in outside.items():
        yield Part(site, None, {site: path})
