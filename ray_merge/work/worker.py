"""The worker: holds the job, runs one unit per call. Any call may be repeated, anywhere, and on several threads."""

from __future__ import annotations

from pathlib import Path

import torch

from ray_merge.pool import Turn
from ray_merge.spec import Receipt
from ray_merge.storage.store import Stores
from ray_merge.work.adapter_export import run_adapter
from ray_merge.work.device import ONE_THREAD, STREAMING, check_device, tune_malloc
from ray_merge.work.emr import run_emr
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.job import AdapterCheck, EmrUnit, Job, PreflightUnit, SelectUnit, ShardUnit, Unit
from ray_merge.work.order_statistics import Found, run_select
from ray_merge.work.shards import run_shard


class MergeWorker:
    """Runs units of one job in this process.

    Args:
        job: what to do; nothing else is kept between calls but connections.

    Raises:
        Refusal: the device that was asked for is not there.
    """

    def __init__(self, job: Job) -> None:
        tune_malloc(*STREAMING)
        torch.backends.cuda.matmul.allow_tf32 = False
        check_device(job.device)
        self._job = job
        self._stores = Stores()

    def run(self, unit: Unit, turn: Turn) -> AdapterCheck | list[Found] | list[Receipt]:
        """Do one unit: check an adapter, count entries, make a shard, what emr adds to it, or an exported adapter.

        The turn ends where only hashing, writing and uploading of finished rows are left.
        """
        job = self._job
        dtype = torch.float64 if job.plan.recipe.dtype == "float64" else torch.float32
        opened = AdapterFiles(
            Path(job.cache),
            job.plan.adapters,
            self._stores,
            device=job.device,
            dtype=dtype,
            moments=job.moments,
            phi=job.phi,
        )
        with torch.inference_mode(), ONE_THREAD, opened as files:
            if isinstance(unit, PreflightUnit):
                return files.check(unit.adapter)
            if isinstance(unit, SelectUnit):
                return run_select(job, unit, files, self._stores, turn)
            if isinstance(unit, ShardUnit):
                return run_shard(job, unit, files, self._stores, turn)
            if isinstance(unit, EmrUnit):
                return run_emr(job, unit, files, self._stores, turn)
            return run_adapter(job, unit, files, self._stores, turn)
