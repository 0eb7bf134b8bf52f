"""One adapter unit: the merged update of every site as one PEFT adapter.

Scale and lambda are folded into the factors, so that alpha = r gives them back unchanged. Its
adapter_config.json is written by the driver (drive/exported_config.py).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping

from torch import Tensor

from ray_merge.errors import RunFailed
from ray_merge.plan import ADAPTER_OBJECT, SHARD_METADATA
from ray_merge.pool import worker_label
from ray_merge.spec import FLOAT_DTYPES, Factor, Merge, Receipt, SiteReport
from ray_merge.storage.adapter import PREFIX
from ray_merge.storage.commit import commit, put_receipt
from ray_merge.storage.store import open_store
from ray_merge.storage.writer import ScratchFile
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.job import AdapterUnit, Job
from ray_merge.work.scratch import scratch_folder
from ray_merge.work.shards import site_deltas
from ray_merge.work.tensors import TORCH_DTYPES, to_bytes


def run_adapter(job: Job, unit: AdapterUnit, files: AdapterFiles) -> list[Receipt]:
    """Make, publish and receipt the exported adapter of one merge."""
    started = time.perf_counter()
    merge = next(merge for merge in job.plan.merges if merge.name == unit.merge)
    dtype = FLOAT_DTYPES[job.plan.recipe.out_dtype or "float32"]
    tensors: dict[str, Tensor] = {}
    reports = []
    touched = job.plan.touched(merge)
    for site in sorted((s for s in job.plan.sites.values() if s.tensor in touched), key=lambda s: s.name):
        delta = site_deltas(job, site, [merge], files)[0]
        factor = delta.factors()
        if factor is None:
            raise RunFailed(
                f"merge {merge.name!r}: {site.name} has no factors to export; use export: checkpoint"
            )
        factor = _at_least_rank_one(factor)
        stored = {side: value.to(TORCH_DTYPES[dtype]) for side, value in (("A", factor.A), ("B", factor.B))}
        tensors |= {f"{PREFIX}{site.name}.lora_{side}.weight": value for side, value in stored.items()}
        reports.append(
            SiteReport(
                site=site.name,
                tensor=site.tensor,
                rank=max(1, delta.rank),
                update_norm=delta.norm(),
                lost_share=0.0,
                truncation_error=delta.truncation_error,
            )
        )
    return [_publish(job, unit, merge, tensors, dtype, tuple(reports), started)]


def _at_least_rank_one(factor: Factor) -> Factor:
    """An update of zero as factors of rank 1: PEFT has no rank 0, and a site may not get lost."""
    if factor.B.shape[1]:
        return factor
    return Factor(factor.B.new_zeros((factor.B.shape[0], 1)), factor.A.new_zeros((1, factor.A.shape[1])))


def _publish(
    job: Job,
    unit: AdapterUnit,
    merge: Merge,
    tensors: Mapping[str, Tensor],
    dtype: str,
    reports: tuple[SiteReport, ...],
    started: float,
) -> Receipt:
    merge_id = job.merge_ids[merge.name]
    path = scratch_folder(job, merge.name) / f"{merge_id[:12]}-adapter-{uuid.uuid4().hex[:8]}"
    layout = [(name, dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    file = ScratchFile(path, layout, SHARD_METADATA)
    try:
        for tensor in tensors.values():
            file.write(to_bytes(tensor))
        sha256 = file.close()
        store = open_store(job.outputs[merge.name])
        adopted = commit(store, ADAPTER_OBJECT, path, sha256=sha256, merge_id=merge_id)
    finally:
        file.discard()
    receipt = Receipt(
        merge_id=merge_id,
        name=ADAPTER_OBJECT,
        n_bytes=file.n_bytes,
        sha256=sha256,
        tensors=len(tensors),
        unit=unit.id,
        sites=reports,
        seconds={"total": round(time.perf_counter() - started, 3)},
        worker=worker_label(),
        adopted=adopted,
    )
    return put_receipt(store, receipt)
