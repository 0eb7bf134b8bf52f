"""What Fisher diagonals are taken of: each adapter's model class with its head, whose labels, and the stages.

Owns: which log-likelihood a task has, and what is refused because it has none. Adapters of different classes run in
plans of their own, because a stage holds one model. Reads headers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from ray_merge.errors import RecipeError, Refusal
from ray_merge.plan.moments import MomentsPlan, TaskData, plan_moments
from ray_merge.plan.task_heads import Classes, adapter_of, check_complete, head_kind, head_rows
from ray_merge.recipe import Recipe
from ray_merge.recipe.model import Evaluation
from ray_merge.spec import Site
from ray_merge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ray_merge.models.skeleton import Skeleton

Head = Literal["classification", "regression", "causal"]
Labels = Literal["expected", "sampled", "empirical"]

MAX_EXPECTED = 100
"""Outputs with `labels: expected`: each takes a backward pass of its own."""

SUM_BYTES = 8
"""Of a running sum of squares, for each entry of a weight."""

NO_LIKELIHOOD = (
    "without which there is no log-likelihood; save the adapter with its head (modules_to_save), or use "
    "regmean"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """The log-likelihood of one task's examples.

    Args:
        head: what the model gives out.
        labels: whose: all by their probability, one drawn by it, or the one in the data.
        n_outputs: C of a classification or regression; 0 of a causal model.
        evaluation: where the labels in the data are; None where none are read.
    """

    head: Head
    labels: Labels
    n_outputs: int
    evaluation: Evaluation | None = None


@dataclass(frozen=True, slots=True)
class FisherPlan:
    """Tasks of one model class: their stages and parts, and what is differentiated."""

    stages: MomentsPlan
    likelihoods: Mapping[str, Likelihood]


def plan_fisher(
    recipe: Recipe,
    base: Checkpoint,
    tasks: Sequence[TaskData],
    sites: Mapping[str, Site],
    labels: Labels,
    *,
    memory_bytes: int | None = None,
    workers: int = 1,
) -> list[FisherPlan]:
    """Lay out the computation of Fisher diagonals.

    Args:
        recipe: the validated recipe.
        base: headers of the base.
        tasks: each with its own adapter, which is active.
        sites: whose diagonals are wanted, by name.
        labels: whose log-likelihood.
        memory_bytes: ceiling for one stage, where the recipe has no `stages`; None for no ceiling.
        workers: that could hold a stage each.

    Returns:
        One plan for each model class, in order of tasks.

    Raises:
        Refusal: a task has no log-likelihood or no such labels, or a ceiling cannot be kept.
    """
    classes = Classes(base)
    groups: dict[str, list[TaskData]] = {}
    likelihoods: dict[str, Likelihood] = {}
    for task in tasks:
        skeleton = classes.of(recipe, task)
        likelihoods[task.name] = _likelihood(recipe, task, skeleton, labels)
        check_complete(task, skeleton, NO_LIKELIHOOD)
        groups.setdefault(skeleton.name, []).append(task)
    plans = []
    for name, some in groups.items():
        n_blocks = classes.n_blocks(name)
        stages = _stages(recipe, base, name, some, sites, memory_bytes, workers, n_blocks)
        plans.append(FisherPlan(stages, {task.name: likelihoods[task.name] for task in some}))
    return plans


def _likelihood(recipe: Recipe, task: TaskData, skeleton: Skeleton, labels: Labels) -> Likelihood:
    place, adapter = f"adapters.{task.name}", adapter_of(task)
    config: Any = skeleton.model.config
    head: Head | None = head_kind(skeleton.name)
    problem = getattr(config, "problem_type", None)
    if head is None or problem == "multi_label_classification":
        raise RecipeError(
            f"{place}: fisher needs one log-likelihood for each example, which {problem or skeleton.name} does not "
            "give; write task: classification, regression or generation if it is one of these, or use regmean"
        )
    if adapter.tokens:
        raise RecipeError(
            f"{place}: it trains single tokens of {next(iter(adapter.tokens))}, which cannot be active while inputs "
            "run through stages; leave it out of merges by fisher"
        )
    if head == "causal":
        if labels == "expected":
            raise RecipeError(
                f"{place}: labels: expected takes a backward pass for each of the vocabulary's tokens; write labels: "
                "sampled"
            )
        return Likelihood(head=head, labels=labels, n_outputs=0)
    n_outputs = head_rows(adapter, skeleton)
    if recipe.adapters[task.name].task == "regression" or problem == "regression" or n_outputs == 1:
        head = "regression"
    if labels == "expected" and n_outputs > MAX_EXPECTED:
        raise RecipeError(
            f"{place}: labels: expected takes a backward pass for each of its {n_outputs} labels, at most "
            f"{MAX_EXPECTED} are run; write labels: sampled"
        )
    evaluation = recipe.adapters[task.name].eval if labels == "empirical" else None
    if labels == "empirical" and (evaluation is None or (head == "regression" and n_outputs > 1)):
        why = "it has no eval" if evaluation is None else f"its head gives {n_outputs} numbers"
        raise RecipeError(
            f"{place}: labels: empirical needs the label of every row, but {why}; add eval: {{path, label, metric}} of "
            "the data, or write labels: sampled"
        )
    return Likelihood(head=cast("Head", head), labels=labels, n_outputs=n_outputs, evaluation=evaluation)


def _stages(
    recipe: Recipe,
    base: Checkpoint,
    class_name: str,
    tasks: Sequence[TaskData],
    sites: Mapping[str, Site],
    memory_bytes: int | None,
    workers: int,
    n_blocks: int,
) -> MomentsPlan:
    """The stages of one class, as many as keep the ceiling with their sums of squares."""
    # The class that is run is the one that config.json says the base was saved from.
    as_class = replace(base, config={**base.config, "architectures": [class_name]})
    asked = recipe.stages
    while True:
        plan = plan_moments(recipe, as_class, tasks, sites, memory_bytes=memory_bytes, workers=workers)
        largest = max(_sum_bytes(plan, stage, sites) for stage in range(len(plan.stages)))
        plan = replace(plan, base=base, peak_bytes=plan.peak_bytes + largest)
        if memory_bytes is None or asked is not None or plan.peak_bytes <= memory_bytes:
            return plan
        if len(plan.stages) >= n_blocks:
            raise Refusal(
                f"--memory: one stage of {base.url} with its sums of squares takes about "
                f"{plan.peak_bytes / 1e6:.0f} MB, the ceiling is {memory_bytes / 1e6:.0f} MB; raise it"
            )
        recipe = recipe.model_copy(update={"stages": min(n_blocks, 2 * len(plan.stages))})


def _sum_bytes(plan: MomentsPlan, stage: int, sites: Mapping[str, Site]) -> int:
    names = [name for part in plan.parts_of(stage) for name in part.modules]
    return sum(SUM_BYTES * sites[name].shape[0] * sites[name].shape[1] for name in names)
