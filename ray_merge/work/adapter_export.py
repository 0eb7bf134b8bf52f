"""One adapter unit: the merged update of every site as one PEFT adapter.

Scale and lambda are folded into the factors, so that alpha = r gives them back unchanged. Its
adapter_config.json is written by the driver (drive/exported_config.py).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

import torch

from ray_merge.algebra.delta import Delta, product_norm
from ray_merge.algebra.truncate import truncate
from ray_merge.errors import RunFailed
from ray_merge.plan import ADAPTER_OBJECT, SHARD_METADATA, Plan
from ray_merge.pool import Turn, worker_label
from ray_merge.spec import FLOAT_DTYPES, Factor, Figures, Merge, Receipt, Site, SiteReport
from ray_merge.storage.adapter_names import PREFIX
from ray_merge.storage.commit import commit, put_receipt
from ray_merge.storage.store import Stores
from ray_merge.storage.writer import ScratchFile
from ray_merge.work.deltas import site_deltas
from ray_merge.work.diagnostics import Diagnosis
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.job import AdapterUnit, Job
from ray_merge.work.scratch import scratch_folder
from ray_merge.work.tensors import TORCH_DTYPES, to_bytes

if TYPE_CHECKING:
    from torch import Tensor

COPY_BYTES = 2**20


def run_adapter(
    job: Job, unit: AdapterUnit, files: AdapterFiles, stores: Stores, turn: Turn
) -> list[Receipt]:
    """Make, publish and receipt the exported adapter of one merge; the turn ends before the publishing.

    The header of a safetensors file needs every rank, and ranks are known when the last site is merged: tensors
    are spooled to disk first, so that memory holds one site and not the whole adapter.
    """
    started = time.perf_counter()
    merge = next(merge for merge in job.plan.merges if merge.name == unit.merge)
    dtype = FLOAT_DTYPES[job.plan.recipe.out_dtype or "float32"]
    sites = sorted(job.plan.touched(merge), key=lambda site: site.name)
    layout: list[tuple[str, str, tuple[int, ...]]] = []
    reports = []
    folder = scratch_folder(job, merge.name)
    with TemporaryFile(dir=folder) as spool:
        for site in sites:
            turn.check()
            begun = time.perf_counter()
            delta = site_deltas(site, [merge], files, no_base, unit.thresholds)[0]
            exact = delta.factors()
            if exact is None:
                raise RunFailed(
                    f"merge {merge.name!r}: {site.name} has no factors to export; use export: checkpoint"
                )
            factor, error = truncated(merge, exact)
            stored = Factor(factor.B.to(TORCH_DTYPES[dtype]), factor.A.to(TORCH_DTYPES[dtype]))
            for name, tensor in exported_tensors(job.plan, merge, site, stored):
                layout.append((name, dtype, tuple(tensor.shape)))
                spool.write(to_bytes(tensor))
            report = _report(merge, site, delta, factor, stored, error)
            seconds = round(time.perf_counter() - begun, 6)
            figures = _figures(job.plan, merge, site, files)
            reports.append(replace(report, seconds=seconds, figures=figures))
        turn.end()
        return [_publish(job, unit, merge, layout, spool, tuple(reports), started, stores)]


def _figures(plan: Plan, merge: Merge, site: Site, files: AdapterFiles) -> Figures:
    """Diagnostics without a base weight; where a checkpoint is written as well, its rows have them all."""
    if merge.export != "adapter" or not plan.recipe.diagnostics:
        return {}
    return Diagnosis(plan.recipe, site, [merge], files, no_base).figures(merge.adapters)


def no_base() -> Tensor:
    """In place of a base weight: what can be exported does not depend on one (plan/export.py)."""
    raise RunFailed("an exported adapter depends on the base weight; use export: checkpoint")


def truncated(merge: Merge, exact: Factor) -> tuple[Factor, float]:
    """The factors within the rank or tolerance that the merge asks for, and their relative Frobenius error.

    An update of zero has rank 1: PEFT has no rank 0, and a site may not get lost.
    """
    B_OR, A_RI, error = exact.B, exact.A, 0.0
    if merge.export_rank is not None or merge.export_tolerance is not None:
        B_OR, A_RI, error = truncate(B_OR, A_RI, rank=merge.export_rank, tolerance=merge.export_tolerance)
    if not B_OR.shape[1]:
        B_OR, A_RI = B_OR.new_zeros((B_OR.shape[0], 1)), A_RI.new_zeros((1, A_RI.shape[1]))
    return Factor(B_OR, A_RI), error


def exported_tensors(plan: Plan, merge: Merge, site: Site, factor: Factor) -> list[tuple[str, Tensor]]:
    """Factors in the layout of a site's weight -> PEFT's names and layouts for that kind of layer."""
    module = plan.module(merge, site.name)
    B_OR, A_RI = factor.B, factor.A
    layout = plan.layout(merge, site.name)
    if layout in ("conv1d", "embedding"):  # stored transposed: delta = A^T B^T
        B_OR, A_RI = A_RI.T, B_OR.T
    if layout == "embedding":
        return [(f"{PREFIX}{module}.lora_embedding_A", A_RI), (f"{PREFIX}{module}.lora_embedding_B", B_OR)]
    if layout == "conv":
        kernel = plan.base.tensors[site.tensor].shape[1:]
        A_RI = A_RI.reshape(A_RI.shape[0], *kernel)
        B_OR = B_OR.reshape(*B_OR.shape, *(1 for _ in kernel[1:]))
    return [(f"{PREFIX}{module}.lora_A.weight", A_RI), (f"{PREFIX}{module}.lora_B.weight", B_OR)]


def _report(
    merge: Merge, site: Site, delta: Delta, factor: Factor, stored: Factor, error: float
) -> SiteReport:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (stored.B, stored.A)):
        raise RunFailed(
            f"merge {merge.name!r}: the exported factors of {site.name} do not fit {stored.B.dtype}; "
            "use out_dtype: float32"
        )
    norm, lost = delta.norm(), 0.0
    if norm and stored.B.dtype != factor.B.dtype:
        B, A = stored.B.to(factor.B.dtype), stored.A.to(factor.A.dtype)
        lost = product_norm(torch.cat([B, factor.B], dim=1), torch.cat([A, -factor.A])) / norm
    return SiteReport(
        site=site.name,
        tensor=site.tensor,
        rank=stored.B.shape[1],
        update_norm=norm,
        lost_share=lost,
        truncation_error=max(error, delta.truncation_error),
        n_bytes=(stored.B.numel() + stored.A.numel()) * stored.B.element_size(),
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
    seconds = round(time.perf_counter() - started, 3)
    receipt = Receipt(
        merge_id=merge_id,
        name=ADAPTER_OBJECT,
        n_bytes=file.n_bytes,
        sha256=sha256,
        tensors=len(layout),
        unit=unit.id,
        sites=reports,
        began=round(time.time() - seconds, 3),
        seconds={"total": seconds},
        worker=worker_label(),
        adopted=adopted,
    )
    return put_receipt(store, receipt)
