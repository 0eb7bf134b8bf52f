"""phi.safetensors -> the curves of learning. Reads the curves' bytes alone, without torch: phi itself may be large."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_merge.spec import TensorEntry
from ray_merge.storage.headers import read_header
from ray_merge.storage.store import Store
from ray_merge.work.stage_job import METADATA_KEY

MAX_NUMBERS = 4_000_000
"""Of one curve; real ones have some 500 steps of some 10 tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Curves over n steps of T tasks (learn/state.py).

    Args:
        tasks: names.
        steps: numbers of the steps that were kept, first and last among them.
        n_steps: all steps.
        objective: at each kept step; empty where the file does not have it, like the others.
        values: by task, at each kept step.
        weights: the same.
        kappa: at each kept step; inf where a task's gradient is zero.
        xi: (T, T) at the last step.
    """

    tasks: tuple[str, ...]
    steps: tuple[int, ...]
    n_steps: int
    objective: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    kappa: tuple[float, ...]
    xi: tuple[tuple[float, ...], ...]


def read_curves(store: Store, path: str, points: int) -> Curves:
    """The curves of one merge, thinned out to at most `points` steps.

    Raises:
        ValueError: the file does not name its tasks, or a curve is no float64 of the right length.
        CheckpointError: it is no safetensors file.
    """
    header = read_header(store, path)
    about = json.loads(header.metadata.get(METADATA_KEY, "{}"))
    tasks = about.get("tasks") if isinstance(about, dict) else None
    if not isinstance(tasks, list) or not tasks:
        raise ValueError("its header names no tasks")
    names = tuple(str(task) for task in tasks)
    found = _Numbers(store, path, header.tensors)
    objective, kappa = found.read("objective", 1), found.read("condition", 1)
    values, weights = found.read("values", len(names)), found.read("weights", len(names))
    n_steps = max(len(objective), len(kappa), len(values) // len(names), len(weights) // len(names))
    steps = kept_steps(n_steps, points)
    return Curves(
        tasks=names,
        steps=steps,
        n_steps=n_steps,
        objective=_at(objective, steps),
        values=_by_task(values, len(names), steps),
        weights=_by_task(weights, len(names), steps),
        kappa=_at(kappa, steps),
        xi=_square(found.read("misalignment", len(names)), len(names)),
    )


@dataclass(frozen=True, slots=True)
class _Numbers:
    store: Store
    path: str
    tensors: Mapping[str, TensorEntry]

    def read(self, name: str, width: int) -> tuple[float, ...]:
        entry = self.tensors.get(f"history.{name}")
        if entry is None:
            return ()
        count = math.prod(entry.shape)
        if entry.dtype != "F64" or count % width or count > MAX_NUMBERS:
            raise ValueError(f"{entry.name} is {entry.dtype} of shape {entry.shape}, not float64 by {width}")
        data = self.store.read(self.path, entry.start, entry.end)
        return struct.unpack(f"<{count}d", data)


def kept_steps(n_steps: int, points: int) -> tuple[int, ...]:
    """At most `points` of the steps 0..n-1, evenly spread, the first and the last among them."""
    if n_steps <= points:
        return tuple(range(n_steps))
    return tuple(round(index * (n_steps - 1) / (points - 1)) for index in range(points))


def _at(curve: Sequence[float], steps: Sequence[int]) -> tuple[float, ...]:
    return tuple(curve[step] if step < len(curve) else math.nan for step in steps) if curve else ()


def _by_task(flat: Sequence[float], n_tasks: int, steps: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    return tuple(_at(flat[task::n_tasks], steps) for task in range(n_tasks)) if flat else ()


def _square(flat: Sequence[float], n_tasks: int) -> tuple[tuple[float, ...], ...]:
    if len(flat) != n_tasks * n_tasks:
        return ()
    return tuple(tuple(flat[row * n_tasks : (row + 1) * n_tasks]) for row in range(n_tasks))
