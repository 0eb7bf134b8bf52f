"""What the outputs of a head are: how many, their names and what they mean, as config.json and heads/ say it.

Adapters hold none of it. transformers keeps what the base's config.json says where it has as many labels, and so does
this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_merge.spec import TensorEntry

SINGLE_LABEL = "single_label_classification"
PROBLEMS = frozenset({"regression", SINGLE_LABEL, "multi_label_classification"})
"""transformers' words for `problem_type`."""

DEFAULT_LABELS = 2
"""Of a config.json that names none."""


def label_names(config: Mapping[str, Any], n_labels: int) -> tuple[str, ...]:
    """Names of a head's outputs: the base's own where it has as many, else LABEL_0, LABEL_1, ...

    Args:
        config: the parsed config.json of the base.
        n_labels: outputs of the head.
    """
    named = config.get("id2label")
    own = {str(key): str(label) for key, label in named.items()} if isinstance(named, Mapping) else {}
    keys = [str(index) for index in range(n_labels)]
    if {*own} == {*keys}:
        return tuple(own[key] for key in keys)
    return tuple(f"LABEL_{key}" for key in keys)


def problem_of(config: Mapping[str, Any], task: str | None, n_labels: int) -> str:
    """The `problem_type` of a head: as the recipe says, else as a base with as many labels says.

    Args:
        config: the parsed config.json of the base.
        task: the recipe's word for the adapter's task.
        n_labels: outputs of the head.
    """
    if task == "regression" or n_labels == 1:
        return "regression"
    said = config.get("problem_type")
    if task != "classification" and n_labels == _labels_of(config) and said in PROBLEMS:
        return str(said)
    return SINGLE_LABEL


def _labels_of(config: Mapping[str, Any]) -> int:
    named = config.get("id2label")
    return len(named) if isinstance(named, Mapping) else config.get("num_labels", DEFAULT_LABELS)


def saved_rows(entries: Sequence[TensorEntry]) -> int:
    """Outputs of a saved head without its class: rows of the matrix that no other one reads; 0 where it has none.

    A hidden layer (`classifier.dense`, `pooler.dense`) is read by the last one, which may have more rows than it.
    """
    shapes = [entry.shape for entry in entries if len(entry.shape) == 2]
    last = [
        rows
        for index, (rows, _) in enumerate(shapes)
        if all(rows != columns for _, columns in shapes[:index] + shapes[index + 1 :])
    ]
    return min(last or [rows for rows, _ in shapes], default=0)
