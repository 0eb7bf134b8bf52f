"""Anchors z_i: the value f_i of each task with its own adapter alone, computed once and kept in the store.

    anchors/<id>.json    {"task", "value", "batches", "inputs"}

The id covers everything that decides the value: base, adapter, data, sample, and how f is measured; not the other
adapters, so all merges of a sweep and all preferences share them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_merge.errors import RunFailed
from ray_merge.identity import digest
from ray_merge.learn.leaves import Leaves
from ray_merge.learn.steps import Passes
from ray_merge.storage.commit import pretty_json
from ray_merge.storage.store import Store

ANCHOR_BATCHES = 32
"""Batches of the learning's own order that an anchor is the mean over, at most; fewer where the sample is smaller."""

MEASURES = (
    "batch_size",
    "group_by_length",
    "micro_batch_size",
    "samples",
    "normalize_entropy",
    "diversity",
    "tokens",
    "precision",
)
"""Parameters that decide how f is measured."""


def anchors_of(
    passes: Passes,
    leaves: Leaves,
    inputs: Mapping[str, Mapping[str, Any]],
    n_rows: Mapping[str, int],
    store: Store,
    note: Callable[[str], None],
) -> list[float]:
    """z_i of each task, in the order of the merge's adapters; zeros where the merge needs none.

    The divergence from a task's own adapter needs none: it is 0 at its best.

    Args:
        passes: of the merge.
        leaves: its phi, which single adapters do not look at.
        inputs: task -> everything that decides its value, as JSON.
        n_rows: task -> rows of its sample.
        store: of the recipe.
        note: told what is being computed.
    """
    merge = passes.learning.merge
    is_needed = merge.parameters.get("scalarisation") == "tchebycheff" and not passes.learning.compares
    if merge.parameters.get("anchors") != "single" or not is_needed:
        return [0.0] * len(passes.learning.tasks)
    found = []
    for place, task in enumerate(passes.learning.tasks):
        document = {**inputs[task], **{key: merge.parameters[key] for key in MEASURES}, "seed": merge.seed}
        path = f"anchors/{digest(document)}.json"
        value = _read(store, path)
        if value is None:
            note(f"anchor of {task}")
            count = min(ANCHOR_BATCHES, math.ceil(n_rows[task] / int(merge.parameters["batch_size"])))
            values = passes.values(place, range(count), alone=True, leaves=leaves)
            value = _mean(task, values)
            about = {"task": task, "value": value, "batches": count, "inputs": document}
            store.put_if_absent(path, pretty_json(about), {})
        found.append(value)
    return found


def _mean(task: str, values: Sequence[float]) -> float:
    value = math.fsum(values) / len(values)
    if not math.isfinite(value):
        raise RunFailed(
            f"the entropy of {task} with its own adapter alone is {value}: the base, the adapter or its head give NaN "
            "or Inf on its data; check them with `ray-merge evaluate`"
        )
    return value


def _read(store: Store, path: str) -> float | None:
    if store.info(path) is None:
        return None
    try:
        value = float(json.loads(store.read(path))["value"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunFailed(f"{store.url}/{path} is damaged; remove it and run again") from error
    return value
