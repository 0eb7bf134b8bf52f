"""Which moments a recipe needs: tasks with data, sites to watch, and the stages that the base is cut into.

Owns the parts that moments are computed, stored and named by: one block of the base, or one site outside of the
blocks. Parts depend on the base and the sites alone, never on how many stages there are, so moments that were
computed in three stages serve a run in thirty. Reads headers only; transformers builds the base on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_merge.errors import RecipeError, Refusal
from ray_merge.models.blocks import natural_key
from ray_merge.recipe import Calibration, DataSource, Recipe
from ray_merge.spec import Adapter, Site
from ray_merge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ray_merge.models.conversion import Slot
    from ray_merge.models.skeleton import Skeleton

WATCHED_LAYOUTS = ("linear", "conv1d")
"""Layouts whose module is called with one row of inputs for each token."""

HANDED_COPIES = 3
"""Of one task's hidden states in a stage: what came in, what goes out, and Ray's copy of that."""

WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
"""What config.json calls the width of the hidden state."""

STAGE_RUNTIME_BYTES = 470 * 10**6
"""A Ray worker with torch, transformers and this package loaded (measured: 410 MB, and 55 MB of Ray's)."""

PASSING_COPIES = 4
"""Of the widest module's outputs for one batch in float32: what goes by inside one block."""


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
    """

    kind: str
    class_name: str
    tasks: int
    parts: int
    stages: int
    peak_bytes: int


def stage_facts(kind: str, plan: MomentsPlan) -> StageFacts:
    """The facts of one plan."""
    return StageFacts(
        kind=kind,
        class_name=plan.class_name,
        tasks=len(plan.tasks),
        parts=len(plan.parts),
        stages=len(plan.stages),
        peak_bytes=plan.peak_bytes,
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
    handed = _handed_bytes(base.config, calibration) if skeleton.blocks else 0
    # What comes in is held while what goes out grows; Ray's copies of both are shared with other processes.
    held = STAGE_RUNTIME_BYTES + HANDED_COPIES * handed + _passing_bytes(skeleton, layers, calibration)
    room = None if memory_bytes is None else max(1, memory_bytes - held)
    sizes = _block_bytes(skeleton, base, parts, calibration)
    stages, stage_bytes = _stages(skeleton, base, sizes, recipe.stages, room, workers)
    return MomentsPlan(
        base=base,
        class_name=skeleton.name,
        tasks=tuple(tasks),
        parts=parts,
        stages=stages,
        conv1d=frozenset(site for site, path in watched.items() if layers[path]),
        unwatched=unwatched,
        calibration=calibration,
        handed_bytes=handed,
        peak_bytes=held + stage_bytes,
    )


def _handed_bytes(config: Mapping[str, Any], calibration: Calibration) -> int:
    """float32 hidden states of all tokens of one task."""
    text = config.get("text_config") or config
    width = next((text[key] for key in WIDTH_KEYS if isinstance(text.get(key), int)), 0)
    return 4 * int(width) * calibration.samples * calibration.max_length


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
    beside_text = _beside_text(skeleton)
    watched: dict[str, str] = {}
    unwatched: dict[str, str] = {}
    for name, site in sites.items():
        names = plain.get(site.tensor, [""])
        path, _, leaf = names[0].rpartition(".")
        linear = [one for one in names if one.rpartition(".")[0] in layers]
        if len(linear) > 1:
            unwatched[name] = f"{site.tensor} is the weight of {len(linear)} layers of {skeleton.name}"
            continue
        if path in beside_text:
            unwatched[name] = f"{path} is called with parts of images, which the tokens' mask does not know"
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
    """Modules of a vision-language model that stand before its blocks: tower and projector."""
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


def _passing_bytes(skeleton: Skeleton, layers: Mapping[str, bool], calibration: Calibration) -> int:
    """What one block takes while a batch goes by: its widest outputs, and its largest weight in float32."""
    inside = [
        path for path in layers if skeleton.blocks is None or skeleton.blocks.block_of(path) is not None
    ]
    shapes = [skeleton.model.get_submodule(path).get_parameter("weight").shape for path in inside]
    widest = max((max(shape) for shape in shapes), default=0)
    tokens = calibration.batch_size * calibration.max_length
    return 4 * (PASSING_COPIES * tokens * widest + max((shape.numel() for shape in shapes), default=0))


def _block_bytes(
    skeleton: Skeleton, base: Checkpoint, parts: Sequence[Part], calibration: Calibration
) -> list[int]:
    """Of each block: its weights as stored, with what stands before or behind the blocks, and its sums.

    Sites that share their input are counted as if each had sums of its own.
    """
    from ray_merge.models.block_list import part_bytes

    n_bytes = {name: entry.n_bytes for name, entry in base.tensors.items()}
    sizes, rest = part_bytes(skeleton.slots, n_bytes, skeleton.blocks)
    sizes = sizes or [rest]
    for part in parts:
        sums = sum(_sum_bytes(skeleton, path, calibration) for path in part.modules.values())
        # Outside of the blocks a site runs in the first stage or in the last one.
        for index in {0, len(sizes) - 1} if part.block is None else {part.block}:
            sizes[index] += sums
    return sizes


def _sum_bytes(skeleton: Skeleton, path: str, calibration: Calibration) -> int:
    """The Gram matrix of one module's inputs, or its sketch with what is added to it at once, in float64."""
    from torch import nn

    module = skeleton.model.get_submodule(path)
    shape = module.get_parameter("weight").shape
    inputs: int = shape[1] if isinstance(module, nn.Linear) else shape[0]
    if calibration.precision == "sketch" and inputs > 2 * calibration.sketch_rows:
        return 8 * 2 * calibration.sketch_rows * inputs
    return 8 * inputs * inputs


def _stages(
    skeleton: Skeleton,
    base: Checkpoint,
    sizes: Sequence[int],
    asked: int | None,
    room: int | None,
    workers: int,
) -> tuple[tuple[tuple[int, int], ...], int]:
    """The stages, and the bytes of the largest one's weights and sums."""
    from ray_merge.models.block_list import cut_stages, fewest_stages

    if asked is not None and asked > len(sizes):
        has = f"has {len(sizes)} blocks" if skeleton.blocks else "has no single list of blocks to cut"
        raise RecipeError(f"stages: {asked}, but {skeleton.name} {has}; use at most {len(sizes)}")
    count = asked or max(min(workers, len(sizes)), 1 if room is None else fewest_stages(sizes, 0, room))
    # Equal work, as long as memory does not ask for equal bytes: an embedding table costs no time.
    ranges = cut_stages([1] * len(sizes), 0, count)
    if room is not None and _largest(sizes, ranges) > room:
        ranges = cut_stages(sizes, 0, count)
    largest = _largest(sizes, ranges)
    if room is not None and asked is None and largest > room:
        raise Refusal(
            f"--memory: one block of {base.url} with what belongs to it takes {largest / 1e6:.0f} MB, but only "
            f"{room / 1e6:.0f} MB of the ceiling are left beside the process itself, one batch and the hidden states "
            "of one task; raise it, or set fewer calibration samples or a smaller batch_size"
        )
    if skeleton.blocks is None:
        return ((0, 0),), largest
    return tuple((blocks.start, blocks.stop) for blocks in ranges), largest


def _largest(sizes: Sequence[int], ranges: Sequence[range]) -> int:
    return max(sum(sizes[index] for index in blocks) for blocks in ranges)
