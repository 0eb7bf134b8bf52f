"""The worker: holds the job, runs one unit per call. Any call may be repeated, anywhere."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from ray_merge.errors import Refusal
from ray_merge.spec import Receipt
from ray_merge.work.adapter_export import run_adapter
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.job import AdapterCheck, Job, PreflightUnit, ShardUnit, Unit
from ray_merge.work.shards import run_shard

M_MMAP_THRESHOLD = -3  # malloc.h
MMAP_THRESHOLD_BYTES = 2**20


class MergeWorker:
    """Runs units of one job in this process.

    Args:
        job: what to do; nothing else is kept between calls.

    Raises:
        Refusal: the device that was asked for is not there.
    """

    def __init__(self, job: Job) -> None:
        # One thread per worker: results must not depend on how many cores a node has, and W workers with
        # C threads each on C cores were measured 9 times slower than one thread each on small matrices.
        torch.set_num_threads(1)
        _return_large_blocks()
        torch.backends.cuda.matmul.allow_tf32 = False
        if job.device.startswith("cuda") and not torch.cuda.is_available():
            raise Refusal(f"device {job.device} was asked for, but this worker has no GPU; use --device cpu")
        self._job = job

    def run(self, unit: Unit) -> AdapterCheck | list[Receipt]:
        """Do one unit: check an adapter, make one shard of some merges, or make one exported adapter."""
        job = self._job
        dtype = torch.float64 if job.plan.recipe.dtype == "float64" else torch.float32
        adapters = dict(job.plan.adapters)
        with (
            torch.inference_mode(),
            AdapterFiles(Path(job.cache), adapters, device=job.device, dtype=dtype) as files,
        ):
            if isinstance(unit, PreflightUnit):
                return files.check(unit.adapter)
            if isinstance(unit, ShardUnit):
                return run_shard(job, unit, files)
            return run_adapter(job, unit, files)


def _return_large_blocks() -> None:
    """Make glibc give blocks of 1 MiB and more back to the system as soon as they are freed.

    By itself it raises that limit to 32 MiB as blocks of that size are freed, and keeps them: a worker that
    streams chunks then holds 391 MB instead of 318 (measured on 2048 x 5632 sites). Elsewhere nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
