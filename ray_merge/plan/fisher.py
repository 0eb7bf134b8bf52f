"""What Fisher diagonals are taken of: each adapter's model class with its head, whose labels, and the stages.

Owns: which log-likelihood a task has, and what is refused because it has none. Adapters of different classes run in
plans of their own, because a stage holds one model. Reads headers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from ray_merge.errors import CheckpointError, RayMergeError, RecipeError, Refusal
from ray_merge.plan.moments import MomentsPlan, TaskData, plan_moments
from ray_merge.recipe import Recipe
from ray_merge.recipe.model import Evaluation
from ray_merge.spec import Adapter, Site
from ray_merge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ray_merge.models.skeleton import Skeleton

Head = Literal["classification", "regression", "causal"]
Labels = Literal["expected", "sampled", "empirical"]

MAX_EXPECTED = 100
"""Outputs with `labels: expected`: each takes a backward pass of its own."""

SUM_BYTES = 8
"""Of a running sum of squares, for each entry of a weight."""

HEADS: tuple[tuple[str, Head], ...] = (
    ("ForSequenceClassification", "classification"),
    ("ForImageClassification", "classification"),
    ("ForCausalLM", "causal"),
    ("LMHeadModel", "causal"),
)
"""How names of classes end that give one log-likelihood for an example."""

TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "generation": "CAUSAL_LM"}
"""The recipe's plain words as PEFT's."""


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
    classes = _Classes(base)
    groups: dict[str, list[TaskData]] = {}
    likelihoods: dict[str, Likelihood] = {}
    for task in tasks:
        skeleton = classes.of(recipe, task)
        likelihoods[task.name] = _likelihood(recipe, task, skeleton, labels)
        _check_complete(task, skeleton)
        groups.setdefault(skeleton.name, []).append(task)
    plans = []
    for name, some in groups.items():
        n_blocks = classes.n_blocks(name)
        stages = _stages(recipe, base, name, some, sites, memory_bytes, workers, n_blocks)
        plans.append(FisherPlan(stages, {task.name: likelihoods[task.name] for task in some}))
    return plans


class _Classes:
    """The model classes of one base, each built once."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._built: dict[str, Skeleton | RayMergeError] = {}

    def of(self, recipe: Recipe, task: TaskData) -> Skeleton:
        """The class that a task's adapter was trained in: with a head, and all of its modules, if there is one."""
        from ray_merge.models.model_class import class_candidates

        adapter = _adapter(task)
        auto = adapter.config.get("auto_mapping")
        named = auto.get("base_model_class") if isinstance(auto, Mapping) else None
        names = class_candidates(
            self._base.config,
            class_name=named if isinstance(named, str) else None,
            task_type=_task_type(recipe, task),
        )
        found = [self._get(name) for name in names]
        built = [one for one in found if not isinstance(one, RayMergeError)]
        modules = [module.partition("[")[0] for module in adapter.modules.values()]

        def fits(one: Skeleton) -> tuple[bool, bool]:
            paths = {path for path, _ in one.model.named_modules()}
            return _head(one.name) is not None, all(module in paths for module in modules)

        if built:
            return max(built, key=fits)  # the first of the best
        raise next(
            (one for one in found if isinstance(one, RayMergeError)),
            CheckpointError(
                f"transformers has no class for the base's model_type {self._base.config.get('model_type')!r}, so no "
                "Fisher information can be computed; use a merge method that needs no data"
            ),
        )

    def n_blocks(self, name: str) -> int:
        """How many stages a class can be cut into."""
        skeleton = self._get(name)
        assert not isinstance(skeleton, RayMergeError)
        return skeleton.blocks.count if skeleton.blocks else 1

    def _get(self, name: str) -> Skeleton | RayMergeError:
        from ray_merge.models.skeleton import build_skeleton

        if name not in self._built:
            shapes = {tensor: entry.shape for tensor, entry in self._base.tensors.items()}
            try:
                self._built[name] = build_skeleton(self._base.config, shapes, name=name)
            except RayMergeError as error:
                self._built[name] = error
        return self._built[name]


def _adapter(task: TaskData) -> Adapter:
    assert task.adapter is not None, "Fisher information is of a task's own adapter"
    return task.adapter


def _task_type(recipe: Recipe, task: TaskData) -> str | None:
    said = recipe.adapters[task.name].task
    kind = _adapter(task).config.get("task_type") if said is None else TASK_TYPES.get(said, said)
    return kind if isinstance(kind, str) else None


def _head(class_name: str) -> Head | None:
    return next((kind for ending, kind in HEADS if class_name.endswith(ending)), None)


def _likelihood(recipe: Recipe, task: TaskData, skeleton: Skeleton, labels: Labels) -> Likelihood:
    place, adapter = f"adapters.{task.name}", _adapter(task)
    config: Any = skeleton.model.config
    head = _head(skeleton.name)
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
    n_outputs = _n_outputs(adapter, skeleton)
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


def _n_outputs(adapter: Adapter, skeleton: Skeleton) -> int:
    """Rows of the head's last linear layer as it was saved; RoBERTa's and DistilBERT's have a hidden one before it."""
    from torch import nn

    config: Any = skeleton.model.config
    inner = f"{getattr(skeleton.model, 'base_model_prefix', '')}."
    layers = [
        name
        for name, module in skeleton.model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inner)
    ]
    saved = {entry.name: entry.shape[0] for entry in adapter.heads}
    return saved.get(f"{layers[-1]}.weight" if layers else "", int(config.num_labels))


def _check_complete(task: TaskData, skeleton: Skeleton) -> None:
    """Refuse a head that is nowhere: neither in the base nor saved with the adapter.

    Raises:
        RecipeError: its first missing parameter.
    """
    adapter = _adapter(task)
    there = {*skeleton.slots, *(entry.name for entry in adapter.heads)}
    inner = f"{getattr(skeleton.model, 'base_model_prefix', '')}."
    names = [name for name, _ in skeleton.model.named_parameters() if not name.startswith(inner)]
    missing = next((name for name in names if name not in there), None)
    if missing is not None:
        raise RecipeError(
            f"adapters.{task.name}: neither {adapter.url} nor the base holds {missing} of {skeleton.name}, without "
            "which there is no log-likelihood; save the adapter with its head (modules_to_save), or use regmean"
        )


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
