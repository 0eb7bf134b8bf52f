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
            for slot in slots.get(parameter, ()):
                if slot.tensor in adapter.replaced:
                    return (
                        files.open(adapter)
                        .read(adapter.replaced[slot.tensor])
                        .to(weight.device, weight.dtype)
                    )
                for site in sites.get(slot.tensor, ()):
                    weight = _with_update(files, task.name, site, weight, slot)
            return weight

        yield alter


def _with_update(files: AdapterFiles, name: str, site: Site, weight: Tensor, slot: Slot) -> Tensor:
    """A copy of the weight with the update of one site, which is a part of it or all."""
    changed = weight.clone()
    part = changed if slot.expert is None else changed[slot.expert]
    if slot.rows is not None:
        part = part.narrow(slot.axis, slot.rows[0], slot.rows[1] - slot.rows[0])
    rows, columns = site.shape
    before_OI = part.reshape(-1, columns)[site.start : site.start + rows]
    delta_OI = files.site([name], site, lambda: before_OI).sum([1.0]).dense(weight.dtype)
    after = part.reshape(-1, columns).clone()
    after[site.start : site.start + rows] += delta_OI
    part.copy_(after.reshape(part.shape))
    return changed
