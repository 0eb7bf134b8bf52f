"""Scores on the demo's test rows: accuracy for classes, Pearson's r for a regression.

Owns: the metrics, scoring a checkpoint folder with a head file, scoring an adapter through PEFT, normalised scores.
Never does: training, merging, printing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_merge.demo import models
from ray_merge.demo.tasks import Task, read_rows

if TYPE_CHECKING:
    from torch import Tensor

_BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class Backbone:
    """A checkpoint in memory, so that one load serves the heads of all tasks."""

    model: Any
    tokenizer: Any


def load_backbone(folder: Path) -> Backbone:
    """Loads a base or merged checkpoint folder the ordinary way, through `from_pretrained`."""
    return Backbone(models.load_classifier(folder), models.load_tokenizer(folder))


def score(checkpoint: Backbone | Path, head_file: Path, task: Task, test_file: Path) -> float:
    """The score of a checkpoint with one task's head.

    Args:
        checkpoint: a folder, or what `load_backbone` made of it.
        head_file: safetensors with `classifier.weight` (labels, hidden) and `classifier.bias` (labels,).
        task: says metric and length.
        test_file: parquet with `text` and `label`.

    Returns:
        Accuracy in 0..1, or Pearson's r in -1..1.

    Raises:
        Refusal: the head belongs to a task of another number of labels.
    """
    backbone = checkpoint if isinstance(checkpoint, Backbone) else load_backbone(checkpoint)
    models.attach_head(backbone.model, head_file, task)
    return _score(backbone.model, backbone.tokenizer, task, test_file)


def score_adapter(base_dir: Path, adapter_dir: Path, task: Task, test_file: Path) -> float:
    """The score of one adapter on its own, loaded by PEFT with its own head."""
    from peft import PeftModel

    base = models.load_classifier(base_dir, task)
    with models.quiet():
        model = PeftModel.from_pretrained(base, str(adapter_dir), local_files_only=True).eval()
    return _score(model, models.load_tokenizer(base_dir), task, test_file)


def normalised(merged: float, single: float) -> float:
    """Percent of the single adapter's score that a merge keeps."""
    return 100.0 * merged / single


def normalised_mean(merged: Mapping[str, float], single: Mapping[str, float]) -> float:
    """Mean over tasks of the normalised scores, in percent."""
    return math.fsum(normalised(merged[name], single[name]) for name in single) / len(single)


def accuracy(predicted: Sequence[int], labels: Sequence[float]) -> float:
    """Share of equal entries."""
    return sum(int(label) == got for got, label in zip(predicted, labels, strict=True)) / len(labels)


def pearson(predicted: Sequence[float], labels: Sequence[float]) -> float:
    """Pearson's r; 0 when either side is constant, where it is not defined."""
    n = len(labels)
    mean_x, mean_y = math.fsum(predicted) / n, math.fsum(labels) / n
    xs, ys = [value - mean_x for value in predicted], [value - mean_y for value in labels]
    scale = math.sqrt(math.fsum(x * x for x in xs) * math.fsum(y * y for y in ys))
    return math.fsum(x * y for x, y in zip(xs, ys, strict=True)) / scale if scale > 0.0 else 0.0


def _score(model: Any, tokenizer: Any, task: Task, test_file: Path) -> float:
    texts, labels = read_rows(test_file)
    logits_NO = _logits(model, tokenizer, models.tokenize(tokenizer, texts, task.max_length))
    if task.is_regression:
        return pearson(logits_NO[:, 0].tolist(), labels)
    return accuracy(logits_NO.argmax(dim=1).tolist(), labels)


def _logits(model: Any, tokenizer: Any, rows: Sequence[models.Tokens]) -> Tensor:
    """Logits in row order, computed in batches of rows of like length."""
    import torch

    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    parts = []
    with models.one_thread(), models.fast_precision(), torch.inference_mode():
        for start in range(0, len(order), _BATCH_ROWS):
            batch = [rows[index] for index in order[start : start + _BATCH_ROWS]]
            parts.append(model(**models.pad(tokenizer, batch)).logits.float())
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(parts)[back]
