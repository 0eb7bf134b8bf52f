"""Units of `init`: the factors of one task at the sites of one part, and all of them together as an adapter's file.

A part's factors are committed to the store under the task's id, so a run that was killed goes on where it was. One
site's Gram matrices are in memory at a time, and not one for each of the other tasks but their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from ray_merge.algebra.moments import Moments
from ray_merge.algebra.osrm import osrm_directions, project_onto, scaled_rows
from ray_merge.algebra.sketch import SketchedMoments
from ray_merge.errors import RunFailed
from ray_merge.identity import digest
from ray_merge.plan.osrm import OsrmSite, OsrmTask
from ray_merge.pool import Turn
from ray_merge.spec import Factor
from ray_merge.storage.adapter import WEIGHTS_FILE
from ray_merge.storage.adapter_names import PREFIX
from ray_merge.storage.cache import NodeCache
from ray_merge.storage.commit import commit
from ray_merge.storage.headers import read_header
from ray_merge.storage.store import Store, Stores, join
from ray_merge.storage.writer import ScratchFile
from ray_merge.work.device import ONE_THREAD
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.moments_file import MomentsFile
from ray_merge.work.osrm_job import (
    STATE_KEY,
    JoinUnit,
    Made,
    OsrmJob,
    PartUnit,
    SiteInit,
    part_path,
    read_state,
    state_text,
)
from ray_merge.work.tensors import to_bytes

Layout = list[tuple[str, str, tuple[int, ...]]]


class OsrmWorker:
    """Runs units of one init.

    Args:
        job: what to do.
    """

    def __init__(self, job: OsrmJob) -> None:
        self._job = job
        self._stores = Stores()

    def run(self, unit: PartUnit | JoinUnit, turn: Turn) -> Made:
        """Do one unit."""
        with ONE_THREAD, torch.inference_mode():
            task = self._job.tasks[unit.task]
            if isinstance(unit, JoinUnit):
                return self._join(task)
            return self._part(task, unit.part, turn)

    def _part(self, task: OsrmTask, part: str, turn: Turn) -> Made:
        store, path = self._store(), part_path(self._job.ids[task.name], list(task.parts).index(part))
        if there := store.info(path):  # of another driver, or of a call whose answer got lost
            return Made(there.n_bytes, adopted=True)
        sites, tensors, found = task.parts[part], list[Tensor](), dict[str, SiteInit]()
        with ExitStack() as stack:
            files = [
                stack.enter_context(closing(self._opened(other, sites[0].site))) for other in task.others
            ]
            adapters = stack.enter_context(self._adapters())
            directions = _Directions(self._job, task, files)
            for site in sites:
                turn.check()
                rows_RI, columns_OR, found[site.site] = directions.at(site, self._own(adapters, task, site))
                tensors += [rows_RI, columns_OR]
        about = {"kind": "osrm", "id": self._job.ids[task.name], "part": part}
        scratch = self._scratch()
        file = ScratchFile(scratch, _layout(sites, self._job.init.r), {STATE_KEY: state_text(about, found)})
        try:
            for tensor in tensors:
                file.write(to_bytes(tensor))
            new = store.put_if_absent(path, scratch, {"sha256": file.close()})
            return Made(file.n_bytes, adopted=not new)
        finally:
            file.discard()

    def _join(self, task: OsrmTask) -> Made:
        store, task_id = self._store(), self._job.ids[task.name]
        headers = [read_header(store, part_path(task_id, index)) for index in range(len(task.parts))]
        found: dict[str, SiteInit] = {}
        for index, header in enumerate(headers):
            owner, some = read_state(header.metadata)
            if owner != task_id:
                where = join(store.url, part_path(task_id, index))
                raise RunFailed(f"{where} is not what init wrote there; remove it and run again")
            found |= some
        layout = _layout(task.sites, self._job.init.r)
        layout += [(f"{PREFIX}{head.name}", head.dtype, head.shape) for head in task.heads]
        about = {"kind": "osrm", "id": task_id, "inputs": self._job.inputs[task.name]}
        file = ScratchFile(self._scratch(), layout, {"format": "pt", STATE_KEY: state_text(about, found)})
        try:
            for index, sites in enumerate(task.parts.values()):
                for name, _, _ in _layout(sites, self._job.init.r):
                    entry = headers[index].tensors[name]
                    file.write(store.read(part_path(task_id, index), entry.start, entry.end))
            with self._adapters() as adapters:
                for head in task.heads:
                    file.write(adapters.saved(task.name).read_bytes(head.start, head.end))
            sha256 = file.close()
            folder = self._stores.open(join(self._job.output, task.name))
            adopted = commit(folder, WEIGHTS_FILE, file.path, sha256=sha256, merge_id=task_id)
            return Made(file.n_bytes, adopted, found)
        finally:
            file.discard()

    def _opened(self, other: str, site: str) -> MomentsFile:
        index = self._job.index
        info = index.objects[other][site]
        cache = NodeCache(Path(self._job.cache) / "adapters")
        return MomentsFile(cache.fetch(self._stores.open(index.store), info.path, info).path)

    def _adapters(self) -> AdapterFiles:
        folder = Path(self._job.cache) / "adapters"
        return AdapterFiles(folder, self._job.adapters, self._stores, device="cpu", dtype=torch.float32)

    def _own(self, adapters: AdapterFiles, task: OsrmTask, site: OsrmSite) -> Factor | None:
        """The trained factors to be projected, in PEFT's layout: B (out, R), A (R, in)."""
        if not self._job.init.project:
            return None
        known = adapters.site([task.name], self._job.sites[site.site], _no_base)
        factor = Factor(known.B[0], known.A[0], known.scales[0])
        return Factor(factor.A.T, factor.B.T, factor.scale) if site.conv1d else factor

    def _store(self) -> Store:
        return self._stores.open(self._job.index.store)

    def _scratch(self) -> Path:
        root = self._store().local_root
        folder = (Path(self._job.scratch) if root is None else root) / "attempts" / self._job.attempt
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"osrm-{uuid4().hex[:12]}"


def _no_base() -> Tensor:
    raise RunFailed("an update that depends on the base weight cannot be projected")


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """Orthonormal rows (r, I) for the sites that share one input, and how far the others' inputs reach along them."""

    rows: Tensor
    null: int
    null_space: int
    reach: float
    sketched: bool


class _Directions:
    """The factors of one task at the sites of one part; sites that share their input share its directions.

    Args:
        job: what to do.
        task: whose factors.
        files: moments of the other tasks, in their order.
    """

    def __init__(self, job: OsrmJob, task: OsrmTask, files: Sequence[MomentsFile]) -> None:
        self._job, self._task, self._files = job, task, files
        self._found: dict[tuple[str, ...], _Found] = {}

    def at(self, site: OsrmSite, own: Factor | None) -> tuple[Tensor, Tensor, SiteInit]:
        """A (r, I) and B (O, r) of a site in float32, and what was found there."""
        init = self._job.init
        shares = tuple(file.leaders[site.site] for file in self._files)
        if shares not in self._found:
            self._found[shares] = self._look(site)
        found = self._found[shares]
        rows_RI, columns_OR, lost = (
            scaled_rows(found.rows, init.row_scale),
            torch.zeros(site.n_outputs, init.r),
            None,
        )
        if own is not None:
            # B takes back what the rows are scaled by.
            scale = init.lora_alpha / init.r * float(rows_RI[0].double().norm())
            columns_OR, lost = project_onto(own.B, own.A, own.scale, found.rows, new_scale=scale)
        result = SiteInit(
            null=found.null,
            null_space=found.null_space,
            reach=found.reach,
            sketched=found.sketched,
            lost=lost,
        )
        return rows_RI, columns_OR, result

    def _look(self, site: OsrmSite) -> _Found:
        init = self._job.init
        others, trace = self._others(site.site)
        # Of the ids alone: neither the order of units nor what else is watched may choose the directions.
        drawn = digest({"task": self._task.name, "site": site.site, "seed": self._job.seed})
        found = osrm_directions(others, init.r, mode=init.mode, seed=int(drawn[:12], 16))
        expected = trace * init.r / site.n_inputs
        reach = found.tail / expected if expected else 0.0
        return _Found(found.A_RI, found.null, found.null_space, reach, found.error > 0)

    def _others(self, site: str) -> tuple[list[Moments | SketchedMoments], float]:
        """The moments of the other tasks, full ones as their mean; and the mean trace of what the mode looks at."""
        weight, total, trace = 1 / len(self._files), list[Tensor](), 0.0
        apart: list[Moments | SketchedMoments] = []
        for name, file in zip(self._task.others, self._files, strict=True):
            one = file.moments(site)
            if not one.count:
                raise RunFailed(
                    f"no token of {name}'s data reached {site}; take more samples, or leave it out"
                )
            if (
                self._job.init.mode == "means"
            ):  # their Grams are not looked at: an empty sketch stands for them
                trace += weight * float(one.mean.square().sum())
                apart.append(SketchedMoments(torch.zeros(1, one.n_columns).double(), 0.0, one.mean, 1))
            elif isinstance(one, SketchedMoments):
                sums = float(one.sketch.square().sum()) + one.gram_error * one.n_columns
                trace += weight / one.count * sums
                apart.append(one)
            else:
                trace += weight / one.count * float(one.gram.trace())
                gram_II = one.gram.mul_(weight / one.count)
                total = [total[0].add_(gram_II) if total else gram_II]
        mean_of = [Moments(gram_II, torch.zeros(len(gram_II)).double(), 1) for gram_II in total]
        return [*apart, *mean_of], trace


def _layout(sites: Sequence[OsrmSite], r: int) -> Layout:
    """What PEFT calls the factors of some sites, in order."""
    layout: Layout = []
    for site in sites:
        layout.append((f"{PREFIX}{site.module}.lora_A.weight", "F32", (r, site.n_inputs)))
        layout.append((f"{PREFIX}{site.module}.lora_B.weight", "F32", (site.n_outputs, r)))
    return layout
