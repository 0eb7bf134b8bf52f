"""The labelled rows of a task: batches of inputs, each with what a right answer is.

Owns: what may stand in a label column. This is the only path by which a label meets a model's answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ray_merge.calibration import Calibrated, labels_of, load_batches
from ray_merge.calibration.limits import limits_of
from ray_merge.calibration.tokens import Tokenizer, load_tokenizer
from ray_merge.errors import DataGone, RecipeError, Refusal, shown
from ray_merge.identity import digest
from ray_merge.recipe import Calibration
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.store import Stores
from ray_merge.work.evaluate_job import ScoredTask
from ray_merge.work.read_task import arrays_of

ALL_ROWS = 2**31
LOOK_AHEAD = 2
"""Tokens behind a label: a point and a digit, or the rest of a word."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The text that a causal model is to go on with.

    Args:
        text: the label, without blanks at its ends.
        n_tokens: that the model may say: as many as the label has alone or behind a blank, one for an empty line in
            front, and `LOOK_AHEAD` that show where the answer ends.
    """

    text: str
    n_tokens: int


Label = int | float | Wanted | None
"""A class, a number, a text; None where the inputs are their own labels (perplexity)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledRows:
    """All rows of a task.

    Args:
        batches: arrays of inputs, in order of length.
        labels: of each batch, one for each row.
        tokenizer: that labels were made tokens by; None where none are.
        cut: how many inputs had more tokens than `calibration.max_length`, and were cut there.
        sha256: of inputs and labels.
    """

    batches: Sequence[Mapping[str, Any]]
    labels: Sequence[Sequence[Label]]
    tokenizer: Tokenizer | None
    cut: int
    sha256: str

    @property
    def n_rows(self) -> int:
        """How many."""
        return sum(len(some) for some in self.labels)

    @property
    def n_bytes(self) -> int:
        """Of the arrays."""
        return sum(int(array.nbytes) for batch in self.batches for array in batch.values())


def read_rows(
    task: ScoredTask, texts: Checkpoint, calibration: Calibration, cache: Path, stores: Stores
) -> LabelledRows:
    """The rows of a task with their labels, all of them looked at.

    Args:
        task: whose.
        texts: whose tokenizer makes tokens of texts.
        calibration: length of texts and size of batches; every row is taken.
        cache: node-local folder.
        stores: opens data and checkpoint.

    Raises:
        Refusal: inputs that the model cannot take, no label column, a label that the head cannot give.
    """
    every = calibration.model_copy(update={"samples": ALL_ROWS})
    try:
        found = load_batches(task.source, every, task.name, texts, cache, stores)
    except Refusal as error:
        if type(error) not in (Refusal, RecipeError, DataGone):
            raise
        # The reader's words are those of unlabelled inputs.
        raise type(error)(str(error).replace(f"adapters.{task.name}.data:", f"{task.where}:", 1)) from error
    labels, tokenizer = _labels(task, found, texts, cache, stores)
    batches = [arrays_of(batch) for batch in found.batches]
    _check_room(task, found, labels, texts, calibration)
    rest = iter(labels)
    split = [list(islice(rest, len(next(iter(batch.values()))))) for batch in batches]
    plain = [[one.text, one.n_tokens] if isinstance(one, Wanted) else one for one in labels]
    sha256 = digest({"inputs": found.sha256, "labels": plain})
    return LabelledRows(batches=batches, labels=split, tokenizer=tokenizer, cut=found.cut, sha256=sha256)


def _labels(
    task: ScoredTask, found: Calibrated, texts: Checkpoint, cache: Path, stores: Stores
) -> tuple[list[Label], Tokenizer | None]:
    """The labels in the order of the batches, and the tokenizer where they are texts."""
    if task.evaluation.metric == "perplexity":
        if found.tokens <= found.rows:
            raise RecipeError(
                f"{task.where}: none of the {found.rows} rows of {task.source.path} has two tokens, so no token "
                "follows another and there is no perplexity; give longer texts"
            )
        return [None] * found.rows, None
    given = labels_of(task.evaluation, found.row_numbers, task.name, stores)
    place = f"{task.where}: {task.source.path}: column {task.evaluation.label!r}"
    if task.answer != "causal":
        return [_number(one, task, place) for one in given], None
    tokenizer = load_tokenizer(texts, task.where, cache, stores)
    return [_wanted(one, tokenizer, place) for one in given], tokenizer


def _number(given: float | str, task: ScoredTask, place: str) -> int | float:
    """A class or a number; texts that spell one count (every cell of a csv file is a text)."""
    value = task.label_ids.get(given, _spelled(given)) if isinstance(given, str) else given
    if task.answer == "regression":
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        wanted = "a finite number"
    else:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if whole and 0 <= int(value or 0) < task.n_outputs:
            return int(value or 0)
        wanted = f"a class from 0 to {task.n_outputs - 1}"
        if isinstance(given, str) and task.label_ids:
            wanted += f" or one of {', '.join(list(task.label_ids)[:5])} (label2id in the base's config.json)"
    raise RecipeError(f"{place} holds {shown(given)}, but the task's head gives {wanted}; correct the label")


def _spelled(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _wanted(given: float | str, tokenizer: Tokenizer, place: str) -> Wanted:
    if isinstance(given, float):
        raise RecipeError(
            f"{place} holds {given!r}, but exact_match needs the text that follows; write it in quotes"
        )
    text = str(given).strip()
    n_tokens = max(
        len(tokenizer.call(one, add_special_tokens=False)["input_ids"]) for one in (text, f" {text}")
    )
    if not text or not n_tokens:
        raise RecipeError(
            f"{place} holds {shown(given)}, an empty text, which every answer would match; remove the row"
        )
    return Wanted(text, 1 + n_tokens + LOOK_AHEAD)


def _check_room(
    task: ScoredTask, found: Calibrated, labels: Sequence[Label], texts: Checkpoint, calibration: Calibration
) -> None:
    """A prompt whose end was cut off, or that leaves no room for the answer, would be scored without a word."""
    if task.evaluation.metric != "exact_match":
        return
    if found.cut:
        raise RecipeError(
            f"{task.where}: {found.cut} of the {found.rows} texts of {task.source.path} have more than "
            f"{calibration.max_length} tokens and are cut there (calibration.max_length), which exact_match cannot go "
            "on from; raise it"
        )
    masks = [batch.attention_mask for batch in found.batches if batch.attention_mask is not None]
    lengths = [int(length) for mask in masks for length in mask.sum(dim=1)]
    limits = limits_of(texts)
    for length, label in zip(lengths, labels, strict=False):
        assert isinstance(label, Wanted), "exact_match has texts for labels"
        # The last token of an answer is read off and not put in.
        n_tokens = length + label.n_tokens - 1
        if limits.positions is not None and n_tokens > limits.positions:
            raise RecipeError(
                f"{task.where}: a text of {length} tokens and up to {label.n_tokens - 1} of its label are more than "
                f"{limits.url} takes ({limits.positions_key}); remove the row"
            )
