"""The state of a merge that learns, as one object of the store: phi, the optimiser's moments, and the curves.

    learn/<merge id>/step-000123.safetensors

    phi.<leaf>, exp_avg.<leaf>, exp_avg_sq.<leaf>   of the leaf's dtype, and steps.<leaf> (1,)
    history.objective (n,), history.values (n, T), history.weights (n, T), history.condition (n,),
    history.misalignment (T, T) of the last step    float64

Committed once; a damaged one does not count, and the one before it does. Resumed runs continue bit for bit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ray_merge.learn.leaves import Leaves
from ray_merge.storage.store import Store

MOMENTS = ("exp_avg", "exp_avg_sq")
CURVES = ("objective", "values", "weights", "condition", "misalignment")


@dataclass(slots=True)
class History:
    """Curves over the steps so far, T tasks.

    Args:
        objective: Psi before each step.
        values: f_i of each task.
        weights: d Psi / d f_i.
        condition: kappa(J) of the tasks' gradients of phi; inf where one of them is zero.
        misalignment: xi between preferences for one task each, (T, T), at the last step.
    """

    objective: list[float] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    condition: list[float] = field(default_factory=list)
    misalignment: list[list[float]] = field(default_factory=list)

    def tensors(self, n_tasks: int) -> dict[str, Tensor]:
        """By name, float64."""
        return {
            "history.objective": torch.tensor(self.objective, dtype=torch.float64),
            "history.values": torch.tensor(self.values, dtype=torch.float64).view(-1, n_tasks),
            "history.weights": torch.tensor(self.weights, dtype=torch.float64).view(-1, n_tasks),
            "history.condition": torch.tensor(self.condition, dtype=torch.float64),
            "history.misalignment": torch.tensor(self.misalignment, dtype=torch.float64).view(-1, n_tasks),
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> History:
        """From what `tensors` gave."""
        return cls(*(tensors[f"history.{name}"].tolist() for name in CURVES))


@dataclass(frozen=True, slots=True)
class Saved:
    """One state as it is stored."""

    step: int
    path: str
    tensors: Mapping[str, Tensor]


def state_path(merge_id: str, step: int) -> str:
    """Where the state after so many steps lies in a store."""
    return f"learn/{merge_id}/step-{step:06d}.safetensors"


def pack(leaves: Leaves, optimiser: torch.optim.AdamW, history: History, n_tasks: int) -> bytes:
    """The bytes of a state; the same state gives the same bytes."""
    tensors: dict[str, Tensor] = {}
    for name, leaf in leaves.tensors.items():
        tensors[f"phi.{name}"] = leaf.detach().clone()
        moments = optimiser.state.get(leaf)
        if moments:
            tensors |= {f"{one}.{name}": moments[one].clone() for one in MOMENTS}
            tensors[f"steps.{name}"] = moments["step"].reshape(1).clone()
    tensors |= history.tensors(n_tasks)
    bare = safetensors.torch.save(tensors)
    # Of the content without this line: what a flipped byte changes is then found out.
    return safetensors.torch.save(tensors, {"sha256": hashlib.sha256(bare).hexdigest()})


def unpack(data: bytes) -> dict[str, Tensor] | None:
    """The tensors of a state; None where the bytes are damaged."""
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        said = re.search(rb'"sha256":"([0-9a-f]{64})"', data[8 : 8 + length])
    except (safetensors.SafetensorError, ValueError):
        return None
    bare = hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()
    return tensors if said is not None and said[1].decode() == bare else None


def restore(tensors: Mapping[str, Tensor], leaves: Leaves, optimiser: torch.optim.AdamW) -> History:
    """Put a state back into leaves and optimiser; returns the curves so far."""
    with torch.no_grad():
        for name, leaf in leaves.tensors.items():
            leaf.copy_(tensors[f"phi.{name}"])
            if f"exp_avg.{name}" in tensors:
                moments = {one: tensors[f"{one}.{name}"].clone() for one in MOMENTS}
                optimiser.state[leaf] = {"step": tensors[f"steps.{name}"].reshape(()).clone(), **moments}
    return History.of(tensors)


def latest(store: Store, merge_id: str) -> Saved | None:
    """The state with the most steps that is whole."""
    there = sorted((info.path for info in store.list(f"learn/{merge_id}")), reverse=True)
    for path in there:
        step = re.fullmatch(r".*/step-([0-9]{6})\.safetensors", path)
        tensors = unpack(store.read(path)) if step else None
        if step and tensors is not None:
            return Saved(int(step[1]), path, tensors)
    return None
