"""What a worker of `evaluate` is told: models, tasks, and one (model, task) per call. All of it is picklable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ray_merge.fit.owners import is_head
from ray_merge.plan.task_heads import TaskHead
from ray_merge.pool import Pool, Worker
from ray_merge.recipe import Calibration, DataSource, Placement
from ray_merge.recipe.model import Evaluation
from ray_merge.spec import Adapter, Site
from ray_merge.storage.checkpoint import Checkpoint

Answer = Literal["classification", "regression", "causal"]
"""What a model gives out for a task: one class, one number, or the next token."""

HITS_AT = (1, 3, 5)
"""The k of joint Hits@k."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTask:
    """Labelled data, and what is asked of a model.

    Args:
        name: the recipe's.
        evaluation: label column and metric.
        source: where the rows are, and which columns the inputs are.
        class_name: the transformers class that answers.
        n_blocks: of that class, 0 where it has no list of blocks.
        answer: what it gives out.
        n_outputs: labels of its head; 0 of a causal model.
        label_ids: names of labels -> their numbers, as the base's config.json has them.
        adapter: its own, which also holds its head.
        text: its head where that is a matrix of texts, which answers in place of the class's own.
    """

    name: str
    evaluation: Evaluation
    source: DataSource
    class_name: str
    n_blocks: int
    answer: Answer
    n_outputs: int
    label_ids: Mapping[str, int]
    adapter: Adapter
    text: TaskHead | None = None

    @property
    def where(self) -> str:
        """The recipe's place, for messages."""
        return f"adapters.{self.name}.eval"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredModel:
    """One model without a head of its own: a checkpoint, and what is active on it.

    Args:
        name: base, single/<task>, or a merge's.
        checkpoint: headers of its weights.
        texts: whose tokenizer makes tokens of texts.
        adapter: that is active, without its head; None for the checkpoint alone.
        sites: of that adapter, by name.
    """

    name: str
    checkpoint: Checkpoint
    texts: Checkpoint
    adapter: Adapter | None = None
    sites: Mapping[str, Site] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateJob:
    """The part of an evaluation that never changes.

    Args:
        models: by name.
        tasks: by name.
        base: whose tokenizer the versions are of.
        calibration: length of texts and size of batches.
        versions: task -> digest of its inputs and labels, made by the base's tokenizer; empty while they are looked at.
        cache: node-local folder.
        device: torch device.
        placement: of the workers over a cluster's nodes.
        peak_bytes: estimated resident bytes of one worker.
        room: models that one worker holds at once.
    """

    models: Mapping[str, ScoredModel]
    tasks: Mapping[str, ScoredTask]
    base: Checkpoint
    calibration: Calibration
    versions: Mapping[str, str]
    cache: str
    device: str
    placement: Placement
    peak_bytes: int
    room: int = 1


@dataclass(frozen=True, slots=True)
class ScoreUnit:
    """Score one model on one task.

    Args:
        model: which.
        task: whose rows and head.
        pool: tasks whose heads all answer besides, for joint hits; empty for none.
    """

    model: str
    task: str
    pool: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Unit id; a colon is in no name."""
        return f"{self.model}: {self.task}"


@dataclass(frozen=True, slots=True)
class Score:
    """What one unit found.

    Args:
        value: of the task's metric.
        n: rows.
        hits: share of rows whose label is among the first k of the pooled labels, for HITS_AT; empty without a pool.
    """

    value: float
    n: int
    hits: tuple[float, ...] = ()


EvaluatePoolFactory = Callable[[EvaluateJob, int], Pool]
"""Makes the pool for a job of so many units."""


def without_head(adapter: Adapter) -> Adapter:
    """What an adapter does to the body of its model."""
    kept = {tensor: entry for tensor, entry in adapter.replaced.items() if not is_head(tensor, adapter)}
    return replace(adapter, heads=(), replaced=kept)


def head_alone(adapter: Adapter) -> Adapter:
    """An adapter's head, and nothing that it does to the body."""
    kept = {tensor: entry for tensor, entry in adapter.replaced.items() if is_head(tensor, adapter)}
    return replace(adapter, factors={}, replaced=kept, tokens={})


@dataclass(frozen=True, slots=True)
class EvaluateWorkerFactory:
    """Makes the worker in the process where it will run; picklable, and torch is imported only there."""

    job: EvaluateJob

    def __call__(self) -> Worker:
        """The worker of this process."""
        from ray_merge.work.evaluate_unit import EvaluateWorker

        return EvaluateWorker(self.job)
