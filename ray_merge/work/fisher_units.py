"""A stage's part in a Fisher diagonal: gradients of each example's log-likelihood, one backward pass at a time.

The last stage makes them from its logits, the others take those that the stage behind handed on. Labels and row
numbers travel with the hidden states, so that what is drawn for a row depends on that row alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_merge.calibration import labels_of
from ray_merge.errors import RecipeError, RunFailed, shown
from ray_merge.models.losses import (
    check_logits,
    drawn_labels,
    expected_passes,
    expected_score,
    label_score,
    next_tokens,
)
from ray_merge.models.stage_calls import Alter, StageInput, StageOutput
from ray_merge.plan.fisher import Likelihood
from ray_merge.pool import Turn
from ray_merge.storage.store import Stores
from ray_merge.work.hand_on import stage_input
from ray_merge.work.held import Held
from ray_merge.work.squares import Squares

ROWS, LABELS = "rows", "labels"
"""What a batch carries besides inputs of the model: row numbers (B,) int64, and labels (B,)."""

Arrays = Mapping[str, Any]


def model_inputs(one: Arrays) -> dict[str, Any]:
    """A batch without what is not for the model."""
    return {name: values for name, values in one.items() if name not in (ROWS, LABELS)}


def with_rows(
    batches: Sequence[Arrays],
    row_numbers: Sequence[int],
    likelihood: Likelihood,
    task: str,
    names: Mapping[str, Any],
    stores: Stores,
) -> list[Arrays]:
    """The batches with their row numbers, and with labels where those in the data are asked for.

    Args:
        batches: of the task.
        row_numbers: of every example, in the order of the batches.
        likelihood: of the task.
        task: its name.
        names: the base's `label2id`, for labels that are text.
        stores: opens the data.

    Raises:
        RecipeError: a label that the head does not have.
    """
    labels: np.ndarray[Any, Any] | None = None
    if likelihood.evaluation is not None:
        found = labels_of(likelihood.evaluation, row_numbers, task, stores)
        where = f"adapters.{task}.eval: {likelihood.evaluation.path}: column {likelihood.evaluation.label!r}"
        labels = np.array([_label(one, likelihood, names, where) for one in found])
    made: list[Arrays] = []
    start = 0
    for batch in batches:
        stop = start + len(next(iter(batch.values())))
        more = {ROWS: np.array(row_numbers[start:stop], dtype=np.int64)}
        made.append({**batch, **more, **({} if labels is None else {LABELS: labels[start:stop]})})
        start = stop
    return made


def _label(value: float | str, likelihood: Likelihood, names: Mapping[str, Any], where: str) -> float:
    named = names.get(value) if isinstance(value, str) else value
    if likelihood.head == "regression" and isinstance(named, int | float):
        return float(named)
    whole = isinstance(named, int) or (isinstance(named, float) and named.is_integer())
    if whole and 0 <= int(named or 0) < likelihood.n_outputs:
        return int(named or 0)
    wanted = (
        "a number" if likelihood.head == "regression" else f"a class from 0 to {likelihood.n_outputs - 1}"
    )
    raise RecipeError(f"{where} holds {shown(value)}, but the task's head needs {wanted}; correct the label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Gradients through one stage.

    Args:
        held: the frozen weights.
        altered: the task's own adapter.
        likelihood: what is differentiated.
        device: torch device.
        draw: row number -> generator of its labels.
    """

    held: Held
    altered: Alter | None
    likelihood: Likelihood
    device: str
    draw: Callable[[int], Random]

    def calls(self, one: Arrays) -> Mapping[str, int]:
        """Module path -> how often it runs in this stage; looks at the first example of a batch."""
        found: Counter[str] = Counter()
        first = {name: np.asarray(values)[:1] for name, values in model_inputs(one).items()}
        if "pixel_shape" in one:
            first["pixel_shape"] = np.array([1, *one["pixel_shape"][1:]])
        self.held.stage.forward(
            self._given(first), altered=self.altered, watch=lambda path, _: found.update([path]), to_end=True
        )
        return found

    def run(
        self,
        inputs: Sequence[Arrays],
        above: Sequence[Any] | None,
        squares: Squares,
        turn: Turn,
        *,
        hand_on: bool,
    ) -> list[Any]:
        """Go back through the stage with every batch.

        Args:
            inputs: of this stage.
            above: for each batch (C, B, L, H) float32, gradients of its output; None for the last stage.
            squares: takes the gradients of modules.
            turn: of this unit.
            hand_on: whether the gradients of the inputs are wanted.

        Returns:
            For each batch the gradients of its input, as `above`; empty where they are not wanted.
        """
        handed = []
        for place, one in enumerate(inputs):
            given = self._given(model_inputs(one))
            n_examples, n_tokens = _size(given)
            stack = []
            for index in range(self._n_passes()):
                turn.check()
                squares.begin(n_examples, n_tokens)
                made = self.held.stage.backward(
                    given,
                    None if above is None else torch.tensor(above[place][index], device=self.device),
                    altered=self.altered,
                    loss=None if above is not None else self._loss(one, given, index),
                    on_weight_grad=squares,
                )
                squares.end()
                if hand_on and made.hidden is not None:
                    stack.append(made.hidden.float().cpu().numpy())
            if stack:
                handed.append(np.stack(stack))
        return handed

    def _n_passes(self) -> int:
        """Gradients of an example whose squares are added."""
        likelihood = self.likelihood
        if likelihood.labels != "expected":
            return 1
        return expected_passes(likelihood.head, likelihood.n_outputs)

    def _loss(self, one: Arrays, given: StageInput, index: int) -> Callable[[StageOutput], Tensor]:
        head, likelihood = self.likelihood.head, self.likelihood
        ids, mask = given.extras.get("input_ids"), given.attention_mask

        def loss(out: StageOutput) -> Tensor:
            if out.logits is None:
                raise RunFailed("the model gave out no logits; use a merge method that needs no labels")
            logits = out.logits
            check_logits(head, logits, likelihood.n_outputs, None if ids is None else ids.shape[1])
            if likelihood.labels == "expected":
                return expected_score(head, logits, index)
            if likelihood.labels == "sampled":
                draws = [self.draw(int(row)) for row in one[ROWS]]
                return label_score(head, logits, drawn_labels(head, logits, ids, mask, draws))
            return label_score(head, logits, self._given_labels(one, logits, ids, mask))

        return loss

    def _given_labels(self, one: Arrays, logits: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.likelihood.head == "causal":
            assert ids is not None
            return next_tokens(ids, mask)
        labels = torch.tensor(np.asarray(one[LABELS]), device=logits.device)
        if self.likelihood.head == "regression":
            return labels[:, None].double() - logits.detach().double()
        return labels.long()

    def _given(self, one: Arrays) -> StageInput:
        given = stage_input(one, self.device)
        return given if self.likelihood.head == "causal" else self.held.padded(given)


def drawing(seed: int, task: str) -> Callable[[int], Random]:
    """Generators of labels: what is drawn for a row depends on seed, task and row alone."""

    def draw(row: int) -> Random:
        content = hashlib.sha256(f"{seed}\nfisher\n{task}\n{row}".encode()).digest()
        return Random(int.from_bytes(content[:8], "big"))

    return draw


def _size(given: StageInput) -> tuple[int, int]:
    """Examples and tokens of each, of a batch."""
    named = given.extras.get("input_ids")
    shape = (
        given.hidden if given.hidden is not None else named if named is not None else torch.empty(0)
    ).shape
    if len(shape) >= 2:
        return int(shape[0]), int(shape[1])
    return len(next(iter(given.extras.values()))), 0
