"""What learned merges need: the model class, the stages, the shape of phi at every site, and what is minimised.

Merges of one model class learn in one pool, one after another, and share its weights. Reads headers only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ray_merge.algebra.phi_shape import Coefficients, phi_shape
from ray_merge.errors import RecipeError
from ray_merge.methods.registry import get
from ray_merge.plan.moments import MomentsPlan, TaskData, plan_moments, tasks_with_data
from ray_merge.plan.plan import Plan
from ray_merge.plan.stages import WIDTH_KEYS
from ray_merge.plan.task_heads import TaskHead, plan_heads
from ray_merge.recipe import Calibration, Recipe
from ray_merge.spec import FactorEntry, Merge, TensorEntry

Precision = Literal["float32", "float64", "bfloat16"]

FACTOR_COPIES = 3
"""Of the factors at a site in the arithmetic's dtype: as read, as a basis, and what goes by while an update is made."""

KEPT_BYTES = 2**30
"""Activations of one batch that a stage keeps at most; beyond it, it computes them again."""

KEPT_WIDTHS, KEPT_INNER = 16, 4
"""Tensors of the hidden width and of the MLP's width that autograd keeps for one token and block: inputs of norms and
products, and what low-rank side paths add."""

LOGIT_COPIES = 5
"""Of a batch's logits over the vocabulary: themselves, their gradient, and log p with its own."""

INNER_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim")
HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """One merge whose phi is to be learned.

    Args:
        merge: adapters in order, and all parameters.
        coefficients: what phi multiplies.
        heads: task -> its head; empty where nothing is predicted (nsc).
        shapes: site -> shape of its phi, in the order of blocks, then what stands outside.
        touching: site -> places of the adapters that have factors there.
        targets: task -> the sites whose inputs are measured; empty where predictions are.
        replaced: disk tensor -> (adapter, saved tensor) that takes its place in the merged model.
    """

    merge: Merge
    coefficients: Coefficients
    heads: Mapping[str, TaskHead]
    shapes: Mapping[str, tuple[int, ...]]
    touching: Mapping[str, tuple[int, ...]]
    targets: Mapping[str, tuple[str, ...]]
    replaced: Mapping[str, tuple[str, TensorEntry]]

    @property
    def compares(self) -> bool:
        """Whether predictions are compared with those of each task's own adapter."""
        return bool(self.heads) and self.merge.parameters["objective"] == "agreement"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that have a loss, in the order of the merge's adapters."""
        measured = self.heads or self.targets
        return tuple(name for name in self.merge.adapters if name in measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnPlan:
    """Merges that learn in one pool.

    Args:
        stages: the model, its tasks and the watched modules. Its calibration is that of one batch.
        learnings: in recipe order.
        dtype: of phi and of the arithmetic.
        precision: what matrix products of the model are made in.
        recompute: whether a stage makes the activations of a block again when it goes back through it, because those of
            all its blocks for one batch would not fit.
    """

    stages: MomentsPlan
    learnings: tuple[Learning, ...]
    dtype: Literal["float32", "float64"]
    precision: Precision
    recompute: bool

    def sites_of(self, learning: Learning, stage: int) -> list[str]:
        """The sites of a merge that a stage may run; those outside of the blocks are in the first or in the last."""
        here = [site for part in self.stages.parts_of(stage) for site in part.modules]
        return [site for site in (*here, *self.stages.unwatched) if site in learning.shapes]

    def last_stage(self, learning: Learning) -> int:
        """The last stage that a merge needs: with the head, or with the last site that is measured."""
        if learning.heads:
            return len(self.stages.stages) - 1
        targets = {site for some in learning.targets.values() for site in some}
        stages = range(len(self.stages.stages))
        return max(
            stage
            for stage in stages
            if any(site in targets for part in self.stages.parts_of(stage) for site in part.modules)
        )

    def calibration(self, learning: Learning) -> Calibration:
        """Which rows a task's batches are drawn from, one by one."""
        samples = learning.merge.parameters["samples"] or 2**31
        return self.stages.calibration.model_copy(update={"samples": samples, "batch_size": 1})


def plan_learning(
    plan: Plan, merges: Sequence[Merge], *, memory_bytes: int | None, workers: int
) -> list[LearnPlan]:
    """Lay out the learning of the merges that learn.

    Args:
        plan: of the run.
        merges: of the plan; those that do not learn are passed over.
        memory_bytes: ceiling for one stage, where the recipe has no `stages`; None for no ceiling.
        workers: that could hold a stage each.

    Raises:
        Refusal: a task without data or without the head that the method needs, no layer to measure at, a site that no
            stage runs, a model that cannot be cut as asked.
    """
    groups: dict[tuple[str, Precision], list[tuple[Merge, dict[str, TaskHead]]]] = {}
    for merge in merges:
        if get(merge.method).learned:
            class_name, heads = _heads(plan, merge)
            key = class_name, _precision(plan.recipe, merge)
            groups.setdefault(key, []).append((merge, heads))
    return [
        _plan_group(plan, name, precision, some, memory_bytes, workers)
        for (name, precision), some in groups.items()
    ]


def _heads(plan: Plan, merge: Merge) -> tuple[str, dict[str, TaskHead]]:
    """The class to run, "" for the base's own, and heads by task."""
    if is_null_space(merge):
        return "", {}
    return plan_heads(
        plan.recipe,
        plan.base,
        _tasks(plan, merge),
        merge,
        tokens=int(merge.parameters["tokens"]),
        include=merge.parameters["without_entropy"] == "include",
    )


def is_null_space(merge: Merge) -> bool:
    """Whether a learned merge measures activations in place of predictions."""
    return "layers" in merge.parameters


def _tasks(plan: Plan, merge: Merge) -> list[TaskData]:
    tasks = tasks_with_data(plan.recipe, merge.adapters, f"merge {merge.name!r} by {merge.method}")
    return [TaskData(task.name, task.data, plan.adapters[task.name]) for task in tasks]


def _precision(recipe: Recipe, merge: Merge) -> Precision:
    if recipe.dtype == "float64":
        if merge.parameters["precision"] == "bfloat16":
            raise RecipeError(
                f"merge {merge.name!r}: precision: bfloat16 with dtype: float64; remove one of them"
            )
        return "float64"
    return "bfloat16" if merge.parameters["precision"] == "bfloat16" else "float32"


def _plan_group(
    plan: Plan,
    class_name: str,
    precision: Precision,
    some: Sequence[tuple[Merge, dict[str, TaskHead]]],
    memory_bytes: int | None,
    workers: int,
) -> LearnPlan:
    recipe = plan.recipe
    names = [name for name in plan.adapters if any(name in merge.adapters for merge, _ in some)]
    tasks = [task for merge, _ in some for task in _tasks(plan, merge)]
    by_name = {task.name: task for task in tasks}
    sites = {site: plan.sites[site] for name in names for site in plan.adapters[name].factors}
    batch = max(int(merge.parameters["batch_size"]) for merge, _ in some)
    calibration = recipe.calibration or Calibration()
    one_batch = calibration.model_copy(update={"samples": batch, "batch_size": batch, "precision": "full"})
    base = (
        replace(plan.base, config={**plan.base.config, "architectures": [class_name]})
        if class_name
        else plan.base
    )
    stages = plan_moments(
        recipe.model_copy(update={"calibration": one_batch}),
        base,
        [by_name[name] for name in names],
        sites,
        memory_bytes=memory_bytes,
        workers=workers,
        site_bytes={site: _factor_bytes(plan, names, site) for site in sites},
    )
    micro = max(_micro_batch(merge) for merge, _ in some)
    kept = activation_bytes(plan.base.config, micro, calibration.max_length, _largest_stage(stages))
    kept += _widened_bytes(plan, stages)
    ceiling = KEPT_BYTES if memory_bytes is None else min(KEPT_BYTES, memory_bytes - stages.peak_bytes)
    recompute = kept > ceiling
    held = stages.peak_bytes + _logit_bytes(plan, [heads for _, heads in some], micro, calibration)
    peak = held + (kept // max(1, _largest_stage(stages)) if recompute else kept)
    stages = replace(stages, base=plan.base, peak_bytes=peak)
    return LearnPlan(
        stages=stages,
        learnings=tuple(_learning(plan, stages, merge, heads) for merge, heads in some),
        dtype=recipe.dtype,
        precision=precision,
        recompute=recompute,
    )


def _widened_bytes(plan: Plan, stages: MomentsPlan) -> int:
    """Weights in float32 that autograd keeps where they are stored in half of it."""
    stored = sum(entry.n_bytes for entry in plan.base.tensors.values() if entry.dtype in ("F16", "BF16"))
    return 2 * stored // len(stages.stages)


def _logit_bytes(
    plan: Plan, heads: Sequence[Mapping[str, TaskHead]], micro: int, calibration: Calibration
) -> int:
    """Logits of a causal model for one batch, their gradient, and what a loss makes of them."""
    if not any(head.kind == "causal" for some in heads for head in some.values()):
        return 0
    text = plan.base.config.get("text_config") or plan.base.config
    return 4 * LOGIT_COPIES * micro * calibration.max_length * int(text.get("vocab_size") or 0)


def _micro_batch(merge: Merge) -> int:
    whole = int(merge.parameters["batch_size"])
    return min(whole, int(merge.parameters["micro_batch_size"]) or whole)


def _largest_stage(stages: MomentsPlan) -> int:
    return max(1, *(stop - first for first, stop in stages.stages))


def activation_bytes(config: Mapping[str, Any], rows: int, length: int, n_blocks: int) -> int:
    """What autograd keeps of some blocks for one batch, at most: float32 inputs of every product, and attention."""
    text = config.get("text_config") or config
    width = next((text[key] for key in WIDTH_KEYS if isinstance(text.get(key), int)), 1024)
    inner = next((text[key] for key in INNER_KEYS if isinstance(text.get(key), int)), 4 * width)
    heads = next((text[key] for key in HEAD_KEYS if isinstance(text.get(key), int)), 16)
    tokens = rows * length
    return 4 * n_blocks * (tokens * (KEPT_WIDTHS * width + KEPT_INNER * inner) + 2 * tokens * length * heads)


def _factor_bytes(plan: Plan, names: Sequence[str], site: str) -> int:
    rows, columns = plan.sites[site].shape
    rank = sum(_rank(plan, name, site) for name in names)
    item = 8 if plan.recipe.dtype == "float64" else 4
    return item * FACTOR_COPIES * rank * (rows + columns)


def _rank(plan: Plan, name: str, site: str) -> int:
    update = plan.adapters[name].factors.get(site)
    return 0 if update is None else update.rank


def _learning(plan: Plan, stages: MomentsPlan, merge: Merge, heads: Mapping[str, TaskHead]) -> Learning:
    coefficients = get(merge.method).learned
    assert coefficients, "only merges that learn come here"
    trained = next((name for name in merge.adapters if plan.adapters[name].tokens), None)
    if trained is not None:
        raise RecipeError(
            f"merge {merge.name!r}: adapter {trained} trains single tokens of "
            f"{next(iter(plan.adapters[trained].tokens))}, which cannot be active while inputs run through stages; "
            f"leave it out of merges by {merge.method}"
        )
    touched = {site for name in merge.adapters for site in plan.adapters[name].factors}
    ordered = [site for part in stages.parts for site in part.modules if site in touched]
    ordered += [site for site in stages.unwatched if site in touched]
    shapes = {
        site: phi_shape(
            coefficients,
            plan.sites[site].shape,
            [_rank(plan, name, site) for name in merge.adapters],
        )
        for site in ordered
    }
    touching = {
        site: tuple(place for place, name in enumerate(merge.adapters) if _rank(plan, name, site))
        for site in ordered
    }
    targets = dict(_targets(plan, stages, merge)) if is_null_space(merge) else {}
    return Learning(
        merge=merge,
        coefficients=coefficients,
        heads=heads,
        shapes=shapes,
        touching=touching,
        targets=targets,
        replaced=plan.replaced(merge),
    )


def _targets(plan: Plan, stages: MomentsPlan, merge: Merge) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The sites of each task's own adapter whose inputs are measured."""
    n_blocks = stages.stages[-1][1]
    layers, pattern = str(merge.parameters["layers"]), str(merge.parameters["modules"])
    chosen = chosen_blocks(layers, n_blocks)
    if chosen and max(chosen) >= n_blocks:
        raise RecipeError(
            f"merge {merge.name!r}: layers: {layers} names block {max(chosen)}, but {stages.class_name} has {n_blocks} "
            f"blocks, 0 to {n_blocks - 1}"
        )
    there = [
        site
        for part in stages.parts
        if part.block in chosen
        for site, path in part.modules.items()
        if re.search(pattern, path)
    ]
    for name in merge.adapters:
        factors = plan.adapters[name].factors
        own = tuple(site for site in there if isinstance(factors.get(site), FactorEntry))
        if not own:
            raise RecipeError(
                f"merge {merge.name!r}: adapter {name} has no factors at layers: {layers} with modules: {pattern!r} of "
                f"{stages.class_name} ({n_blocks} blocks), so nsc has nothing to measure; choose others"
            )
        yield name, own


def chosen_blocks(layers: str, n_blocks: int) -> list[int]:
    """The numbers of the blocks that `layers` names: all, last, last_quarter, or a list like 3,5 or 8-11."""
    if layers == "all":
        return list(range(n_blocks))
    if layers in ("last", "last_quarter"):
        count = 1 if layers == "last" else math.ceil(n_blocks / 4)
        return list(range(max(0, n_blocks - count), n_blocks))
    found: list[int] = []
    for part in layers.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return sorted(set(found))
