"""What a task predicts: its model class, its head, and why an entropy of its predictions is or is not to be had.

Owns: which transformers class an adapter was trained in, and the kinds of heads. Fisher diagonals (plan/fisher.py) and
entropies of predictions (TARA, AdaMerging) ask here. Reads headers and configs only, and
the numbers of a text head (plan/text_head.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ray_merge.errors import CheckpointError, RecipeError, Refusal
from ray_merge.plan.embeddings import embedding_classes, embedding_width, misses
from ray_merge.plan.moments import TaskData
from ray_merge.plan.text_head import HeadFile, head_file
from ray_merge.recipe import Recipe
from ray_merge.spec import Adapter, Merge
from ray_merge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ray_merge.models.skeleton import Skeleton

Kind = Literal["classification", "causal"]

HEADS: tuple[tuple[str, Kind], ...] = (
    ("ForSequenceClassification", "classification"),
    ("ForImageClassification", "classification"),
    ("ForCausalLM", "causal"),
    ("LMHeadModel", "causal"),
)
"""How names of classes end that give one prediction for an example, or one for each token that follows."""

TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "generation": "CAUSAL_LM"}
"""The recipe's plain words as PEFT's."""

USE_NSC = "use merge_method: nsc, which looks at activations and needs no labels and no head"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskHead:
    """How a task predicts.

    Args:
        kind: classes of an example, tokens that follow, or cosines with texts.
        n_outputs: C; 0 of a causal model.
        model_class: that is run.
        file: of a text head.
    """

    kind: Literal["classification", "causal", "text"]
    n_outputs: int
    model_class: str
    file: HeadFile | None = None


class Classes:
    """The model classes of one base, each built once."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._built: dict[str, Skeleton | Refusal] = {}

    def of(self, recipe: Recipe, task: TaskData, kind: str | None = None) -> Skeleton:
        """The class that a task's adapter was trained in: with a head, and all of its modules, if there is one.

        Args:
            recipe: says what the task is, where its adapter does not.
            task: with its adapter.
            kind: PEFT's task type, which then counts alone.

        Raises:
            CheckpointError: there is none.
        """
        from ray_merge.models.model_class import class_candidates

        adapter = adapter_of(task)
        auto = adapter.config.get("auto_mapping")
        named = auto.get("base_model_class") if isinstance(auto, Mapping) else None
        names = class_candidates(
            self._base.config,
            class_name=named if isinstance(named, str) else None,
            task_type=kind or task_type(recipe, task),
        )
        found = [self._get(name) for name in names]
        built = [one for one in found if not isinstance(one, Refusal)]
        modules = [module.partition("[")[0] for module in adapter.modules.values()]

        def fits(one: Skeleton) -> tuple[bool, bool]:
            paths = {path for path, _ in one.model.named_modules()}
            return head_kind(one.name) is not None, all(module in paths for module in modules)

        if built:
            return max(built, key=fits)  # the first of the best
        raise next(
            (one for one in found if isinstance(one, Refusal)),
            CheckpointError(
                f"transformers has no class for the base's model_type {self._base.config.get('model_type')!r}, so its "
                "predictions cannot be computed; use a merge method that needs no data"
            ),
        )

    def embedding(self, trained_in: Skeleton, adapter: Adapter) -> list[tuple[Skeleton, int]]:
        """The classes that hold an adapter's sites and give one embedding of an example, with its width; best first."""
        names = embedding_classes(self._base.config, trained_in.name)
        saved = [entry.name for entry in adapter.heads]
        found = [one for one in map(self._get, names) if not isinstance(one, Refusal)]
        return [
            (one, width)
            for one in found
            if (width := embedding_width(one)) is not None and not misses(one, list(adapter.factors), saved)
        ]

    def n_blocks(self, name: str) -> int:
        """How many stages a class can be cut into."""
        skeleton = self._get(name)
        assert not isinstance(skeleton, Refusal)
        return skeleton.blocks.count if skeleton.blocks else 1

    def _get(self, name: str) -> Skeleton | Refusal:
        from ray_merge.models.skeleton import build_skeleton

        if name not in self._built:
            shapes = {tensor: entry.shape for tensor, entry in self._base.tensors.items()}
            try:
                self._built[name] = build_skeleton(self._base.config, shapes, name=name)
            except Refusal as error:
                self._built[name] = error
        return self._built[name]


def adapter_of(task: TaskData) -> Adapter:
    """The task's own adapter."""
    assert task.adapter is not None, "predictions are of a task's own adapter"
    return task.adapter


def task_type(recipe: Recipe, task: TaskData) -> str | None:
    """PEFT's word for what a task is: as the recipe says, else as the adapter does."""
    return adapter_type(recipe, adapter_of(task))


def adapter_type(recipe: Recipe, adapter: Adapter) -> str | None:
    """PEFT's word for what an adapter's head is for: as the recipe says, else as the adapter does."""
    said = recipe.adapters[adapter.name].task
    kind = adapter.config.get("task_type") if said is None else TASK_TYPES.get(said, said)
    return kind if isinstance(kind, str) else None


def head_kind(class_name: str) -> Kind | None:
    """What a class predicts, None where it gives no single prediction."""
    return next((kind for ending, kind in HEADS if class_name.endswith(ending)), None)


def head_rows(adapter: Adapter, skeleton: Skeleton) -> int:
    """Rows of the head's last linear layer as it was saved; RoBERTa's and DistilBERT's have a hidden one before it."""
    from torch import nn

    config: Any = skeleton.model.config
    inner = f"{getattr(skeleton.model, 'base_model_prefix', '')}."
    layers = [
        name
        for name, module in skeleton.model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inner)
    ]
    saved = {entry.name: entry.shape[0] for entry in adapter.heads if entry.shape}
    return saved.get(f"{layers[-1]}.weight" if layers else "", int(config.num_labels))


def check_complete(task: TaskData, skeleton: Skeleton, why: str) -> None:
    """Refuse a head that is nowhere: neither in the base nor saved with the adapter.

    Args:
        task: with its adapter.
        skeleton: of its class.
        why: the consequence, and what to do besides saving the head.

    Raises:
        RecipeError: its first missing parameter.
    """
    adapter = adapter_of(task)
    there = {*skeleton.slots, *(entry.name for entry in adapter.heads)}
    inner = f"{getattr(skeleton.model, 'base_model_prefix', '')}."
    names = [name for name, _ in skeleton.model.named_parameters() if not name.startswith(inner)]
    missing = next((name for name in names if name not in there), None)
    if missing is not None:
        raise RecipeError(
            f"adapters.{task.name}: neither {adapter.url} nor the base holds {missing} of {skeleton.name}, {why}"
        )


class NoEntropy(RecipeError):
    """A task whose predictions have no entropy of classes."""


def plan_heads(
    recipe: Recipe,
    base: Checkpoint,
    tasks: Sequence[TaskData],
    merge: Merge,
    *,
    tokens: int,
    include: bool = False,
) -> tuple[str, dict[str, TaskHead]]:
    """The one model class of the tasks of an entropy method, and the head of each task that has an entropy.

    Args:
        recipe: the validated recipe.
        base: headers of the base.
        tasks: of the merge, each with its adapter.
        merge: for messages.
        tokens: predictions of a causal model that count, 0 for none.
        include: pass over tasks without an entropy, as long as one has it.

    Raises:
        RecipeError: a task that has no entropy of classes, tasks of different classes, a head that is nowhere.
    """
    classes = Classes(base)
    found: dict[str, TaskHead] = {}
    for task in tasks:
        try:
            found[task.name] = _head(recipe, classes, task, merge, tokens)
        except NoEntropy:
            if not include:
                raise
    if not found:
        raise NoEntropy(
            f"merge {merge.name!r} by {merge.method}: none of its tasks has an entropy of classes; {USE_NSC}"
        )
    first = next(iter(found))
    for name, head in found.items():
        if head.model_class != found[first].model_class:
            raise RecipeError(
                f"merge {merge.name!r} by {merge.method}: {first} is a {found[first].model_class} and {name} a "
                f"{head.model_class}, but phi is learned in one model class; merge them apart, or {USE_NSC}"
            )
    return found[first].model_class, found


def _head(recipe: Recipe, classes: Classes, task: TaskData, merge: Merge, tokens: int) -> TaskHead:
    place = f"merge {merge.name!r} by {merge.method}: adapters.{task.name}"
    said = recipe.adapters[task.name].task
    if said == "regression":
        raise NoEntropy(f"{place} is a regression, which has no entropy of classes; {USE_NSC}")
    if recipe.adapters[task.name].head is not None:
        return _text_head(place, recipe, classes, task)
    # Of a causal model, `task: classification` says which of its tokens is looked at, not that it has other heads.
    by_token = tokens > 0 and adapter_of(task).config.get("task_type") == "CAUSAL_LM"
    skeleton = classes.of(recipe, task, "CAUSAL_LM" if by_token else None)
    kind = head_kind(skeleton.name)
    if kind == "classification":
        outputs = _n_classes(place, task, skeleton)
    elif kind is None:
        raise NoEntropy(
            f"{place} is a {skeleton.name}, which predicts no classes of an example ({task_type(recipe, task)}); "
            f"{USE_NSC}"
        )
    elif not tokens or said == "generation":
        raise NoEntropy(
            f"{place} generates text, which has no entropy of classes; {USE_NSC}, or write tokens: 1 for the "
            "entropy of the token behind each prompt"
        )
    else:
        outputs = 0
    check_complete(
        task,
        skeleton,
        f"without which it predicts nothing; save the adapter with its head (modules_to_save), or {USE_NSC}",
    )
    return TaskHead(kind=kind, n_outputs=outputs, model_class=skeleton.name)


def _n_classes(place: str, task: TaskData, skeleton: Skeleton) -> int:
    """C of a head that predicts one of several classes."""
    problem = getattr(skeleton.model.config, "problem_type", None)
    outputs = head_rows(adapter_of(task), skeleton)
    if problem == "regression" or outputs == 1:
        raise NoEntropy(f"{place} is a regression, which has no entropy of classes; {USE_NSC}")
    if problem == "multi_label_classification":
        raise NoEntropy(f"{place} has a multi-label head, which has no single entropy; {USE_NSC}")
    return outputs


def _text_head(place: str, recipe: Recipe, classes: Classes, task: TaskData) -> TaskHead:
    """A matrix of texts, and the class whose embeddings are as wide as its rows."""
    source = recipe.adapters[task.name].head
    assert source is not None, "the caller looked"
    file = head_file(place, source.path, source.logit_scale)
    n_texts, width = file.entry.shape
    trained_in = classes.of(recipe, task)
    found = classes.embedding(trained_in, adapter_of(task))
    if not found:
        raise RecipeError(
            f"{place}.head: {trained_in.name} gives no embedding of an example to compare with texts, and no other "
            f"class does that holds all weights of {adapter_of(task).url}; take head out, or {USE_NSC}"
        )
    model_class = next((one.name for one, own in found if own == width), None)
    if model_class is None:
        widths = ", ".join(f"{one.name} gives {own}" for one, own in found)
        raise RecipeError(
            f"{place}.head: the rows of {source.path} have {width} numbers, but {widths}; make the text head with the "
            "base model"
        )
    return TaskHead(kind="text", n_outputs=n_texts, model_class=model_class, file=file)
