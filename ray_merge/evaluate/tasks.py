"""What is asked for each task: the class that answers, its head, and whether the metric fits it. Reads headers only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray_merge.errors import RecipeError, Refusal
from ray_merge.models.skeleton import Skeleton, build_skeleton
from ray_merge.plan import Plan
from ray_merge.plan.moments import TaskData
from ray_merge.plan.task_heads import (
    Classes,
    TaskHead,
    check_complete,
    head_kind,
    head_rows,
    plan_heads,
)
from ray_merge.recipe import DataSource, Recipe
from ray_merge.recipe.source import nearest
from ray_merge.spec import Adapter, Merge
from ray_merge.work.evaluate_job import Answer, ScoredTask

METRICS: Mapping[Answer, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "mcc"),
    "regression": ("pearson", "spearman"),
    "causal": ("perplexity", "exact_match"),
}
"""What can be measured of each kind of answer."""

CLASSES: Answer = "classification"

CAUSAL_TYPE = "CAUSAL_LM"

ANSWERS: Mapping[Answer, str] = {
    "classification": "one class for each row",
    "regression": "one number for each row",
    "causal": "the token that follows",
}


def chosen_tasks(recipe: Recipe, merges: Sequence[Merge], held_out: Sequence[str]) -> list[str]:
    """The tasks that are scored, in the recipe's order: those of the merges, and those held out.

    Args:
        recipe: with `eval` for its tasks.
        merges: those that were selected; of a recipe without merges every task is scored.
        held_out: tasks that merges are scored on without holding them.

    Raises:
        RecipeError: a task held out that is unknown, has no eval, or is in every merge.
    """
    for name in held_out:
        if name not in recipe.adapters:
            raise RecipeError(f"--held-out {name}: no such adapter{nearest(name, list(recipe.adapters))}")
        if recipe.adapters[name].eval is None or recipe.adapters[name].path is None:
            raise RecipeError(
                f"--held-out {name}: adapters.{name} has no eval, or no path to an adapter with its head; add both"
            )
        if all(name in merge.adapters for merge in merges):
            raise RecipeError(
                f"--held-out {name}: none of the {len(merges)} merge(s) is without {name}; add a merge with adapters: "
                "[...] that leaves it out"
            )
    asked = {name for merge in merges for name in merge.adapters} | {*held_out}
    return [
        name
        for name, source in recipe.adapters.items()
        if source.eval is not None and source.path is not None and (name in asked or not recipe.merges)
    ]


def plan_tasks(plan: Plan, names: Sequence[str], limit: int | None) -> dict[str, ScoredTask]:
    """What is asked of models for each task.

    Args:
        plan: of the recipe, with the adapters of all tasks.
        names: of the tasks.
        limit: rows of each task, from the first; None for all.

    Raises:
        Refusal: a task without a head, or a metric that does not fit it.
    """
    classes = Classes(plan.base)
    return {name: _plan_task(plan, name, limit, classes) for name in names}


def _plan_task(plan: Plan, name: str, limit: int | None, classes: Classes) -> ScoredTask:
    source, adapter = plan.recipe.adapters[name], plan.adapters[name]
    assert source.eval is not None, "chosen_tasks takes tasks with eval"
    inputs = DataSource(path=source.eval.path, text=source.data.text if source.data else None, limit=limit)
    task, metric = TaskData(name, inputs, adapter), source.eval.metric
    skeleton, text = classes.of(plan.recipe, task, _kind(adapter, metric)), None
    if source.head is not None:
        skeleton, text = _text_head(plan, task, metric, skeleton)
    answer, n_outputs = _answer(plan, task, skeleton) if text is None else (CLASSES, text.n_outputs)
    if metric not in METRICS[answer]:
        raise RecipeError(
            f"adapters.{name}.eval: metric {metric} does not fit its head, which gives {ANSWERS[answer]} "
            f"({skeleton.name}); write metric: {' or '.join(METRICS[answer])}, or correct adapters.{name}.task"
        )
    return ScoredTask(
        name=name,
        evaluation=source.eval,
        source=inputs,
        class_name=skeleton.name,
        n_blocks=skeleton.blocks.count if skeleton.blocks else 0,
        answer=answer,
        n_outputs=n_outputs,
        label_ids=_label_ids(plan.base.config.get("label2id")),
        adapter=adapter,
        text=text,
    )


def _kind(adapter: Adapter, metric: str) -> str | None:
    """PEFT's task type, where the metric asks for more than the recipe's `task` says.

    `task: classification` of a causal model says for TARA which of its tokens is looked at, not that it has other
    heads: its labels are texts, which the model is to say.
    """
    own = adapter.config.get("task_type")
    return CAUSAL_TYPE if own == CAUSAL_TYPE and metric in METRICS["causal"] else None


def _text_head(plan: Plan, task: TaskData, metric: str, skeleton: Skeleton) -> tuple[Skeleton, TaskHead]:
    """A head of texts, and the class that gives the embedding that it is compared with."""
    for_messages = Merge(name="evaluate", method=metric, adapters=(task.name,), parameters={})
    name, heads = plan_heads(plan.recipe, plan.base, [task], for_messages, tokens=0)
    if name != skeleton.name:
        shapes = {tensor: entry.shape for tensor, entry in plan.base.tensors.items()}
        skeleton = build_skeleton(plan.base.config, shapes, name=name)
    return skeleton, heads[task.name]


def _label_ids(named: Any) -> dict[str, int]:
    return {key: one for key, one in named.items() if type(one) is int} if isinstance(named, dict) else {}


def _answer(plan: Plan, task: TaskData, skeleton: Skeleton) -> tuple[Answer, int]:
    name = task.name
    config: Any = skeleton.model.config
    head, problem = head_kind(skeleton.name), getattr(config, "problem_type", None)
    if head is None or problem == "multi_label_classification":
        raise RecipeError(
            f"adapters.{name}.eval: {problem or skeleton.name} gives neither a class nor a number nor a next token for "
            "each row, so it is not scored here; write task: classification, regression or generation if it is one of "
            "these, or take its eval out and use --command"
        )
    advice = "save the adapter with its head (modules_to_save), or take the eval out"
    if head == "classification" and plan.adapters[name].config.get("task_type") == CAUSAL_TYPE:
        advice = "write metric: exact_match with the label's text in the label column"
    check_complete(task, skeleton, f"so nothing answers for its eval; {advice}")
    if head == "causal":
        return "causal", 0
    n_outputs = head_rows(plan.adapters[name], skeleton)
    if plan.recipe.adapters[name].task == "regression" or problem == "regression" or n_outputs == 1:
        if n_outputs != 1:
            raise RecipeError(
                f"adapters.{name}.eval: its head gives {n_outputs} numbers for each row, and a label is one; take its "
                "eval out of the recipe"
            )
        return "regression", 1
    return "classification", n_outputs


def joint_pool(tasks: Mapping[str, ScoredTask], names: Collection[str]) -> tuple[str, ...]:
    """The classification tasks among some whose labels are pooled for joint hits; none where there is only one.

    Raises:
        RecipeError: they are of different classes, so that one model cannot answer for all.
    """
    pool = tuple(name for name, one in tasks.items() if name in names and one.answer == "classification")
    other = next((name for name in pool if tasks[name].class_name != tasks[pool[0]].class_name), None)
    if other is not None:
        raise RecipeError(
            f"--hits: {pool[0]} is answered by {tasks[pool[0]].class_name}, {other} by {tasks[other].class_name}; "
            "joint hits need one class for all classification tasks"
        )
    return pool if len(pool) > 1 else ()


def check_hits(tasks: Mapping[str, ScoredTask]) -> None:
    """Refuse joint hits where there are not two label spaces to join."""
    if not joint_pool(tasks, list(tasks)):
        raise Refusal(
            "--hits joins the labels of several classification tasks, and the selected merges have fewer than two with "
            "eval; leave it out"
        )
