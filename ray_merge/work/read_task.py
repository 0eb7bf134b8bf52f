"""A task's data on this worker: sampled, checked to be what the run was planned with, and cut into batches by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_merge.calibration import Batch, Calibrated, data_identity, load_batches
from ray_merge.errors import RunFailed
from ray_merge.identity import digest
from ray_merge.plan.moments import TaskData
from ray_merge.recipe import Calibration
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import Stores

PADDED = ("input_ids", "token_type_ids", "attention_mask")
"""Arrays that are filled up to the longest row of a batch, with 0: the mask says where padding is."""


def read_task(
    task: TaskData,
    calibration: Calibration,
    base: Checkpoint,
    version: str | None,
    cache: Path,
    stores: Stores,
) -> Calibrated:
    """The sampled inputs of a task.

    Args:
        task: whose data.
        calibration: which rows, and how they are put together.
        base: whose tokenizer makes tokens of texts.
        version: digest of the content that the data must still have; None to take them as they are.
        cache: node-local folder.
        stores: opens data and base.

    Raises:
        Refusal: they cannot be used.
        RunFailed: the data or the base's tokenizer changed since the run was planned.
    """
    found = load_batches(task.data, calibration, task.name, base, cache, stores)
    digests = DigestCache(cache / "digests")
    if version is not None and digest(dict(data_identity(task.data, stores, digests))) != version:
        raise RunFailed(
            f"{task.data.path}, the data of {task.name}, changed since the run was planned; run again"
        )
    there = {info.path: info for info in stores.open(base.url).list()}
    changed = next((info.path for info in base.side_files if there.get(info.path) != info), None)
    if changed is not None:
        raise RunFailed(f"{base.url}/{changed} has changed since the run was planned; run again")
    return found


def arrays_of(batch: Batch) -> Mapping[str, Any]:
    """The arrays of a batch by the names that models call them."""
    tensors = {
        "input_ids": batch.input_ids,
        "token_type_ids": batch.token_type_ids,
        "pixel_values": batch.pixel_values,
        "attention_mask": batch.attention_mask,
    }
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


class TaskRows:
    """The rows of one task, to make batches of.

    Args:
        found: batches of one row each.
    """

    def __init__(self, found: Calibrated) -> None:
        self._rows = [arrays_of(batch) for batch in found.batches]

    def lengths(self) -> tuple[int, ...]:
        """The tokens of each row; 1 where it has no mask, as all of them then have as many."""
        masks = [row.get("attention_mask") for row in self._rows]
        return tuple(1 if mask is None else int(mask.sum()) for mask in masks)

    def batch(self, places: Sequence[int]) -> Mapping[str, Any]:
        """The rows at some places, padded on the right to the longest of them."""
        chosen = [self._rows[place] for place in places]
        return {name: _stacked(name, [row[name] for row in chosen]) for name in chosen[0]}


def _stacked(name: str, rows: Sequence[Any]) -> Any:
    if name not in PADDED:
        return np.concatenate(rows)
    stacked = np.zeros((len(rows), max(row.shape[1] for row in rows)), dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        stacked[index, : row.shape[1]] = row[0]
    return stacked
