"""How one model answers for several tasks: changes of weights one after another, and heads side by side.

Heads that are one last layer each are stacked to one, and heads of texts look at one embedding: a pool of them takes
one pass through the model. Others (RoBERTa's has a hidden layer) take a pass each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ray_merge.models.stage_calls import Alter, StageOutput
from ray_merge.spec import Adapter
from ray_merge.work.evaluate_job import ScoredTask
from ray_merge.work.learn_loss import text_logits

Forward = Callable[["Alter | None"], StageOutput]
"""Runs the model on one batch, to its end, with changed weights."""


def remembered(alter: Alter) -> Alter:
    """The same change, made once: every batch would read the factors again and multiply them."""
    kept: dict[str, Tensor] = {}

    def again(parameter: str, weight: Tensor) -> Tensor:
        if parameter not in kept:
            used = alter(parameter, weight)
            if used is weight:
                return weight
            kept[parameter] = used
        return kept[parameter]

    return again


def chained(first: Alter | None, second: Alter | None) -> Alter | None:
    """One change after another."""
    if first is None or second is None:
        return first or second

    def both(parameter: str, weight: Tensor) -> Tensor:
        return second(parameter, first(parameter, weight))

    return both


def one_layer(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """The parameters of the heads, by runtime names, where each is the same one layer; empty where they are not."""
    names = tuple(sorted(entry.name for entry in adapters[0].heads))
    modules = {name.rpartition(".")[0] for name in names}
    alike = all(tuple(sorted(entry.name for entry in one.heads)) == names for one in adapters)
    return names if alike and len(modules) == 1 else ()


class Heads:
    """The heads of some tasks on one body.

    Args:
        tasks: all of one answer.
        body: the change of the model's own weights, None for none.
        own: task -> the change that puts its head there, None for the base's own.
        texts: task -> the matrix of its head where that is one of texts, (C, D).
    """

    def __init__(
        self,
        tasks: Sequence[ScoredTask],
        body: Alter | None,
        own: Mapping[str, Alter | None],
        texts: Mapping[str, Tensor],
    ) -> None:
        self.tasks = tasks
        self._body, self._texts = body, texts
        self._own = {name: chained(body, one) for name, one in own.items()}
        self._stacked = self._stack(own) if len(tasks) > 1 and not texts else None

    def alone(self) -> Alter | None:
        """The change for the one task that there is."""
        return self._own[self.tasks[0].name]

    def answers(self, forward: Forward) -> dict[str, Tensor | None]:
        """Task -> logits (B, C) of one batch, or whatever else the class gives out."""
        if len(self._texts) == len(self.tasks):
            out = forward(self._body)
            return {one.name: self._of_texts(one, out) for one in self.tasks}
        if self._stacked is not None:
            logits = forward(self._stacked).logits
            sizes = [one.n_outputs for one in self.tasks]
            if logits is None or logits.dim() != 2 or logits.shape[1] != sum(sizes):
                return {one.name: logits for one in self.tasks}
            return dict(zip((one.name for one in self.tasks), torch.split(logits, sizes, dim=1), strict=True))
        return {one.name: self._of_class(one, forward) for one in self.tasks}

    def _of_class(self, task: ScoredTask, forward: Forward) -> Tensor | None:
        if task.name in self._texts:
            return self._of_texts(task, forward(self._body))
        return forward(self._own[task.name]).logits

    def _of_texts(self, task: ScoredTask, out: StageOutput) -> Tensor:
        assert task.text is not None
        return text_logits(out, self._texts[task.name], task.text)

    def _stack(self, own: Mapping[str, Alter | None]) -> Alter | None:
        names = one_layer([one.adapter for one in self.tasks])
        changes = [change for one in self.tasks if (change := own[one.name]) is not None]
        if not names or len(changes) < len(self.tasks):
            return None

        def stack(parameter: str, weight: Tensor) -> Tensor:
            return torch.cat([one(parameter, weight) for one in changes]) if parameter in names else weight

        return chained(self._body, remembered(stack))


def pooled(answers: Mapping[str, Tensor], pool: Sequence[ScoredTask]) -> Tensor:
    """(B, P) how likely each label of all tasks is.

    Texts of all heads are compared with one embedding, so their cosines are one ranking; the logits of classifiers mean
    something only within each, so those are made shares of it.
    """
    if all(one.text is not None for one in pool):
        scales = [
            one.text.file.logit_scale for one in pool if one.text is not None and one.text.file is not None
        ]
        return torch.cat([answers[one.name] / scale for one, scale in zip(pool, scales, strict=True)], dim=1)
    return torch.cat([torch.softmax(answers[one.name], dim=1) for one in pool], dim=1)
