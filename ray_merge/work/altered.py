"""A task's own adapter as changed weights: what a stage multiplies by while that adapter is active.

Weights are changed densely, W + dW, so that every kind of adapter that can be merged can also be active.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ray_merge.models.conversion import Slot
from ray_merge.models.stage_calls import Alter
from ray_merge.plan.moments import TaskData
from ray_merge.spec import Site
from ray_merge.storage.store import Stores
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.stage_job import StageJob


@contextmanager
def altered_by(
    job: StageJob, task: TaskData, slots: Mapping[str, Sequence[Slot]], stores: Stores
) -> Iterator[Alter | None]:
    """The change of weights of a task; None where its inputs run through the base alone.

    Args:
        job: whose adapters and sites.
        task: whose adapter is active.
        slots: runtime parameter -> the disk tensors that it is made of.
        stores: of this worker.
    """
    if task.adapter is None:
        yield None
        return
    adapter = task.adapter
    sites: dict[str, list[Site]] = {}
    for name in adapter.factors:
        sites.setdefault(job.sites[name].tensor, []).append(job.sites[name])
    opened = AdapterFiles(
        Path(job.cache) / "adapters", {task.name: adapter}, stores, device=job.device, dtype=torch.float32
    )
    with opened as files:
        heads = {entry.name: entry for entry in adapter.heads}

        def alter(parameter: str, weight: Tensor) -> Tensor:
            if parameter in heads:
                return files.open(adapter).read(heads[parameter]).to(weight.device, weight.dtype)
            used = weight
            for slot in slots.get(parameter, ()):
                if slot.tensor in adapter.replaced:
                    used = (
                        files.open(adapter)
                        .read(adapter.replaced[slot.tensor])
                        .to(weight.device, weight.dtype)
                    )
                for site in sites.get(slot.tensor, ()):
                    # One copy for all sites: a stack of experts has as many of them as experts.
                    used = used.clone() if used is weight else used
                    part = part_of(used, slot)
                    before_OI = matrix_of(part, site)
                    factors = files.site([task.name], site, before_OI.clone)
                    add_update(part, site, factors.sum([1.0]).dense(part.dtype))
            return used

        yield alter


def part_of(weight: Tensor, slot: Slot) -> Tensor:
    """The view of a parameter that one disk tensor fills."""
    part = weight if slot.expert is None else weight[slot.expert]
    return part if slot.rows is None else part.narrow(slot.axis, slot.rows[0], slot.rows[1] - slot.rows[0])


def matrix_of(part: Tensor, site: Site) -> Tensor:
    """The (O, I) matrix of a site in what its disk tensor fills; a view where it can be one."""
    rows, columns = site.shape
    return part.reshape(-1, columns)[site.start : site.start + rows]


def add_update(part: Tensor, site: Site, update_OI: Tensor) -> None:
    """Add the update of one site to what its disk tensor fills, in place."""
    rows, columns = site.shape
    matrix_OI = part.reshape(-1, columns)
    matrix_OI[site.start : site.start + rows] += update_OI
    if matrix_OI.data_ptr() != part.data_ptr():
        part.copy_(matrix_OI.reshape(part.shape))
