"""One adapter unit: the merged update of every site as one PEFT adapter.

Scale and lambda are folded into the factors, so that alpha = r gives them back unchanged. Its
adapter_config.json is written by the driver (drive/exported_config.py).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from tempfile import TemporaryFile
from typing import IO

import torch

from ray_merge.algebra.delta import Delta, product_norm
from ray_merge.errors import RunFailed
from ray_merge.plan import ADAPTER_OBJECT, SHARD_METADATA
from ray_merge.pool import worker_label
from ray_merge.spec import FLOAT_DTYPES, Factor, Merge, Receipt, Site, SiteReport
from ray_merge.storage.adapter import PREFIX
from ray_merge.storage.commit import commit, put_receipt
from ray_merge.storage.store import Stores
from ray_merge.storage.writer import ScratchFile
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.job import AdapterUnit, Job
from ray_merge.work.scratch import scratch_folder
from ray_merge.work.shards import site_deltas
from ray_merge.work.tensors import TORCH_DTYPES, to_bytes

COPY_BYTES = 2**20


def run_adapter(job: Job, unit: AdapterUnit, files: AdapterFiles, stores: Stores) -> list[Receipt]:
    """Make, publish and receipt the exported adapter of one merge.

    The header of a safetensors file needs every rank, and ranks are known when the last site is merged: tensors
    are spooled to disk first, so that memory holds one site and not the whole adapter.
    """
    started = time.perf_counter()
    merge = next(merge for merge in job.plan.merges if merge.name == unit.merge)
    dtype = FLOAT_DTYPES[job.plan.recipe.out_dtype or "float32"]
    touched = job.plan.touched(merge)
    sites = sorted((s for s in job.plan.sites.values() if s.tensor in touched), key=lambda s: s.name)
    layout: list[tuple[str, str, tuple[int, ...]]] = []
    reports = []
    folder = scratch_folder(job, merge.name)
    with TemporaryFile(dir=folder) as spool:
        for site in sites:
            delta = site_deltas(site, [merge], files)[0]
            factor = delta.factors()
            if factor is None:
                raise RunFailed(
                    f"merge {merge.name!r}: {site.name} has no factors to export; use export: checkpoint"
                )
            factor = _at_least_rank_one(factor)
            stored = Factor(factor.B.to(TORCH_DTYPES[dtype]), factor.A.to(TORCH_DTYPES[dtype]))
            for side, tensor in (("A", stored.A), ("B", stored.B)):
                layout.append((f"{PREFIX}{site.name}.lora_{side}.weight", dtype, tuple(tensor.shape)))
                spool.write(to_bytes(tensor))
            reports.append(_report(merge, site, delta, factor, stored))
        return [_publish(job, unit, merge, layout, spool, tuple(reports), started, stores)]


def _at_least_rank_one(factor: Factor) -> Factor:
    """An update of zero as factors of rank 1: PEFT has no rank 0, and a site may not get lost."""
    if factor.B.shape[1]:
        return factor
    return Factor(factor.B.new_zeros((factor.B.shape[0], 1)), factor.A.new_zeros((1, factor.A.shape[1])))


def _report(merge: Merge, site: Site, delta: Delta, exact: Factor, stored: Factor) -> SiteReport:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (stored.B, stored.A)):
        raise RunFailed(
            f"merge {merge.name!r}: the exported factors of {site.name} do not fit {stored.B.dtype}; "
            "use out_dtype: float32"
        )
    norm, lost = delta.norm(), 0.0
    if norm and stored.B.dtype != exact.B.dtype:
        B, A = stored.B.to(exact.B.dtype), stored.A.to(exact.A.dtype)
        lost = product_norm(torch.cat([B, exact.B], dim=1), torch.cat([A, -exact.A])) / norm
    return SiteReport(
        site=site.name,
        tensor=site.tensor,
        rank=max(1, delta.rank),
        update_norm=norm,
        lost_share=lost,
        truncation_error=delta.truncation_error,
    )


def _publish(
    job: Job,
    unit: AdapterUnit,
    merge: Merge,
    layout: Sequence[tuple[str, str, tuple[int, ...]]],
    spool: IO[bytes],
    reports: tuple[SiteReport, ...],
    started: float,
    stores: Stores,
) -> Receipt:
    merge_id = job.merge_ids[merge.name]
    path = scratch_folder(job, merge.name) / f"{merge_id[:12]}-adapter-{uuid.uuid4().hex[:8]}"
    file = ScratchFile(path, layout, SHARD_METADATA)
    try:
        spool.seek(0)
        while data := spool.read(COPY_BYTES):
            file.write(data)
        sha256 = file.close()
        store = stores.open(job.outputs[merge.name])
        adopted = commit(store, ADAPTER_OBJECT, path, sha256=sha256, merge_id=merge_id)
    finally:
        file.discard()
    receipt = Receipt(
        merge_id=merge_id,
        name=ADAPTER_OBJECT,
        n_bytes=file.n_bytes,
        sha256=sha256,
        tensors=len(layout),
        unit=unit.id,
        sites=reports,
        seconds={"total": round(time.perf_counter() - started, 3)},
        worker=worker_label(),
        adopted=adopted,
    )
    return put_receipt(store, receipt)
