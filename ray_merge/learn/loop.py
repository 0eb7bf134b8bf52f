"""The outer loop: values and gradients of all tasks -> Psi -> AdamW -> phi, committed every few steps.

phi and its optimiser live here, in the driver; stages hold frozen weights only. A run that was killed anywhere goes on
from the last committed state and ends with the same phi, bit for bit on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ray_merge.algebra.objectives import condition_number, misalignment
from ray_merge.drive.events import Event
from ray_merge.errors import Refusal, RunFailed
from ray_merge.learn.anchors import anchors_of
from ray_merge.learn.leaves import Leaves
from ray_merge.learn.objective import scalarise
from ray_merge.learn.order import Order
from ray_merge.learn.state import History, latest, pack, restore, state_path
from ray_merge.learn.steps import Passes, TaskGradients
from ray_merge.plan.learn import LearnPlan
from ray_merge.pool_steps import StepPool
from ray_merge.storage.store import ObjectInfo, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What the loop of one merge is given.

    Args:
        plan: stages and merges.
        index: of the merge in the plan.
        merge_id: 64 hex digits.
        inputs: task -> what decides its anchor.
        lengths: task -> tokens of each row of its sample.
        store: of the recipe.
        progress: called with every event.
    """

    plan: LearnPlan
    index: int
    merge_id: str
    inputs: Mapping[str, Mapping[str, Any]]
    lengths: Mapping[str, Sequence[int]]
    store: Store
    progress: Callable[[Event], None]


def learn(lesson: Lesson, pool: StepPool) -> ObjectInfo:
    """Learn the phi of one merge; returns the object of its last state.

    Raises:
        RunFailed: a value or a gradient is no number, or a state in the store is damaged.
    """
    loop = _Loop(lesson, pool)
    began = loop.step
    while loop.step < loop.steps:
        try:
            loop.advance()
        except Refusal as error:
            if began == loop.step == 0:
                raise
            raise loop.failure(str(error)) from error
    return loop.committed()


class _Loop:
    def __init__(self, lesson: Lesson, pool: StepPool) -> None:
        self._lesson = lesson
        learning = lesson.plan.learnings[lesson.index]
        self._learning, self._parameters = learning, learning.merge.parameters
        size = int(self._parameters["batch_size"])
        orders = [
            Order(
                learning.merge.seed,
                task,
                len(lesson.lengths[task]),
                size,
                grouped=bool(self._parameters["group_by_length"]),
            )
            for task in learning.tasks
        ]
        lengths = [lesson.lengths[task] for task in learning.tasks]
        self._passes = Passes(lesson.plan, lesson.index, pool, orders, lengths)
        self._leaves = Leaves(lesson.plan, learning)
        self._optimiser = torch.optim.AdamW(
            list(self._leaves.tensors.values()),
            lr=float(self._parameters["learning_rate"]),
            weight_decay=float(self._parameters["weight_decay"]),
            foreach=False,
        )
        self._history = History()
        self.step, self.steps = 0, int(self._parameters["steps"])
        saved = latest(lesson.store, lesson.merge_id)
        if saved is not None:
            self._history = restore(saved.tensors, self._leaves, self._optimiser)
            self.step = saved.step
        self._anchors: Sequence[float] | None = None

    def advance(self) -> None:
        """One step of the optimiser."""
        if self._anchors is None:
            self._anchors = self._find_anchors()
        found = self._passes.gradients(self._leaves, self.step)
        if self.step == 0:
            self._warn_of_idle(found)
        value, weights_T = scalarise(self._learning, found.values, self._anchors)
        by_site = {
            site: sum(
                (weight * task[site] for weight, task in zip(weights_T.tolist(), found.by_site, strict=True)),
                torch.zeros(shape, dtype=torch.float64),
            )
            for site, shape in self._learning.shapes.items()
        }
        total = float(value) + self._add_penalty(by_site)
        self._leaves.set_gradients(by_site)
        self._check(total, found)
        try:
            self._optimiser.step()
        except RuntimeError as error:  # a learning rate beyond the numbers of phi
            raise self.failure(str(error)) from error
        self._leaves.project()
        self._check(total, found)
        self._note(total, found, weights_T.tolist())
        self.step += 1
        if self.step % int(self._parameters["commit_every"]) == 0 or self.step == self.steps:
            self._commit()

    def committed(self) -> ObjectInfo:
        """The last state."""
        path = state_path(self._lesson.merge_id, self.steps)
        info = self._lesson.store.info(path)
        if info is None:  # no step at all: phi is its init
            self._commit()
            info = self._lesson.store.info(path)
        assert info is not None, f"{path} was put and is not there"
        return info

    def _find_anchors(self) -> Sequence[float]:
        lesson = self._lesson
        n_rows = {task: len(some) for task, some in lesson.lengths.items()}
        note = lambda text: lesson.progress(  # noqa: E731
            Event(kind="learn", text=f"{self._learning.merge.name}: {text}", units=(self.step, self.steps))
        )
        return anchors_of(self._passes, self._leaves, lesson.inputs, n_rows, lesson.store, note)

    def _warn_of_idle(self, found: TaskGradients) -> None:
        """Say which sites no prediction depends on; nsc measures inputs, and what comes behind them never matters."""
        idle = [site for site in self._learning.shapes if not any(task[site].any() for task in found.by_site)]
        if idle and self._learning.heads:
            text = (
                f"merge {self._learning.merge.name!r}: no prediction depends on phi at {len(idle)} of "
                f"{len(self._learning.shapes)} site(s), the first is {idle[0]}: the model never runs them, their "
                "updates are zero, or the predictions are saturated; they keep their init"
            )
            self._lesson.progress(Event(kind="warning", text=text))

    def _add_penalty(self, by_site: dict[str, torch.Tensor]) -> float:
        weight = float(self._parameters["effective_rank"])
        if not weight:
            return 0.0
        value, gradients = self._passes.penalty(self._leaves)
        for site, gradient in gradients.items():
            by_site[site] = by_site[site] + weight * gradient.double()
        return weight * value

    def _check(self, total: float, found: TaskGradients) -> None:
        if math.isfinite(total) and self._leaves.all_finite():
            return
        listed = ", ".join(
            f"{name} {value:g}" for name, value in zip(self._learning.tasks, found.values, strict=True)
        )
        raise self.failure(f"the loss is {total:g} ({listed}), or phi or a gradient is no number")

    def failure(self, why: str) -> RunFailed:
        """What is said of a step that cannot be taken."""
        kept = latest(self._lesson.store, self._lesson.merge_id)
        where = f"the phi of step {kept.step} is kept" if kept else "no phi was committed yet"
        return RunFailed(
            f"merge {self._learning.merge.name!r}: step {self.step + 1} of {self.steps}: {why}; {where}; use a smaller "
            "learning_rate, or check the data and the base"
        )

    def _note(self, total: float, found: TaskGradients, weights: list[float]) -> None:
        history, merge = self._history, self._learning.merge
        history.objective.append(total)
        history.values.append(found.values)
        history.weights.append(weights)
        jacobian_TK = found.jacobian()
        history.condition.append(float(condition_number(jacobian_TK)))
        history.misalignment = misalignment(jacobian_TK).tolist()
        word = "entropy" if self._learning.heads else "omega"
        each = " ".join(
            f"{name} {value:.3f}" for name, value in zip(self._learning.tasks, found.values, strict=True)
        )
        text = f"{merge.name}: objective {total:.4f}, {word} {each}"
        self._lesson.progress(Event(kind="learn", text=text, units=(self.step + 1, self.steps)))

    def _commit(self) -> None:
        store, path = self._lesson.store, state_path(self._lesson.merge_id, self.step)
        data = pack(self._leaves, self._optimiser, self._history, len(self._learning.tasks))
        if not store.put_if_absent(path, data, {}) and store.read(path) != data:
            raise RunFailed(
                f"{store.url}/{path} holds another state than this run came to; it is damaged, or was made on another "
                "kind of processor: remove it and run again"
            )
