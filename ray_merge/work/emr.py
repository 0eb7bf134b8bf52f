"""One emr unit: the unified update and the masks of one shard's sites, as one file (format: plan/emr.py).

Coordinates are computed again, apart from the shard itself: a shard that is there already need not be made for
them, and no base tensor is read unless an update depends on it. Masks are spooled to disk while the coordinates
are written, because both grow together and the file has one after the other.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from tempfile import TemporaryFile
from typing import IO

import torch
from torch import Tensor

from ray_merge.algebra.bits import pack_rows
from ray_merge.errors import RunFailed
from ray_merge.methods.emr import Look, Unified
from ray_merge.plan.emr import EmrSite, emr_layout, emr_metadata, emr_object, emr_sites
from ray_merge.pool import Turn, worker_label
from ray_merge.spec import Merge, Receipt
from ray_merge.storage.commit import commit, put_receipt
from ray_merge.storage.store import Stores
from ray_merge.storage.stream import Reader
from ray_merge.storage.writer import ScratchFile, WriteBehind
from ray_merge.work.deltas import site_deltas
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.job import EmrUnit, Job
from ray_merge.work.scratch import scratch_folder
from ray_merge.work.sources import Sources, check_base, open_base
from ray_merge.work.tensors import TORCH_DTYPES, to_bytes

COPY_BYTES = 2**20

Sums = tuple[tuple[float, float], ...]
"""Per adapter that touches a site: sum |tau_i|, sum |tau_u mask_i|."""


def run_emr(job: Job, unit: EmrUnit, files: AdapterFiles, stores: Stores, turn: Turn) -> list[Receipt]:
    """Make, publish and receipt the emr object beside one shard; the turn ends before the publishing."""
    started = time.perf_counter()
    plan, shard = job.plan, job.plan.shards[unit.shard]
    merge = next(merge for merge in plan.merges if merge.name == unit.merge)
    sites = emr_sites(plan, merge)[shard.index]
    merge_id, folder = job.merge_ids[merge.name], scratch_folder(job, merge.name)
    path = folder / f"{merge_id[:12]}-emr-{shard.name}-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        behind = WriteBehind(turn.check)
        file = ScratchFile(path, emr_layout(sites), emr_metadata(sites), behind)
        stack.callback(file.discard)
        stack.enter_context(behind)  # last, so that nothing is queued when the file is discarded
        base = open_base(stores, plan.base)
        check_base(base, plan.base, shard)
        sources = Sources(plan.base, stack.enter_context(Reader(base)), files)
        tensors = {tensor.name: tensor for tensor in shard.tensors}
        spool = stack.enter_context(TemporaryFile(dir=folder))
        sums: dict[str, Sums] = {}
        for item in sites:
            site = item.site
            whole = (site.start, site.start + site.shape[0])
            values = partial(sources.matrix, tensors[site.tensor], whole, site.shape[1])
            (delta,) = site_deltas(site, [merge], files, values, {})
            assert isinstance(delta, Unified)
            sums[site.name] = _write_site(merge, item, delta, file, spool)
        check_base(base, plan.base, shard)
        turn.end()
        _append(spool, file)
        sha256 = file.close()
        store, name = stores.open(job.outputs[merge.name]), emr_object(shard)
        adopted = commit(store, name, path, sha256=sha256, merge_id=merge_id)
        seconds = round(time.perf_counter() - started, 3)
        receipt = Receipt(
            merge_id=merge_id,
            name=name,
            n_bytes=file.n_bytes,
            sha256=sha256,
            tensors=len(emr_layout(sites)),
            unit=unit.id,
            sums=sums,
            began=round(time.time() - seconds, 3),
            seconds={"total": seconds},
            unit_bytes={"read": sources.n_read, "decoded": sources.n_decoded},
            worker=worker_label(),
            adopted=adopted,
        )
        return [put_receipt(store, receipt)]


def _append(spool: IO[bytes], file: ScratchFile) -> None:
    spool.seek(0)
    while data := spool.read(COPY_BYTES):
        file.write(data)


def _write_site(merge: Merge, item: EmrSite, delta: Unified, file: ScratchFile, spool: IO[bytes]) -> Sums:
    """Append sides and coordinates to the file, masks to the spool."""
    dtype = TORCH_DTYPES[item.dtype]
    for word, shape in item.sides.items():
        file.write(to_bytes(_padded(delta.sides[word], shape).to(dtype)))
    touching = [merge.adapters.index(name) for name in item.adapters]
    space = delta.elected.space
    total = torch.zeros((len(touching), 2), dtype=torch.float64)
    for index in range(space.n_chunks if space.n_entries else 0):
        look = delta.elected.look(index)
        stored_NQ, found = look.unified.to(dtype), _sums(look, touching)
        if not bool(torch.isfinite(stored_NQ).all() and torch.isfinite(found).all()):
            raise RunFailed(
                f"merge {merge.name!r}: the unified update of {item.site.name} is not finite: the base holds NaN or "
                f"Inf, a DoRA row has the norm 0, or it does not fit {item.dtype}; check the base, or use "
                "out_dtype: float32"
            )
        file.write(to_bytes(stored_NQ))
        spool.write(to_bytes(_masks(look, touching)))
        total += found
    missing = item.coordinates[0] - space.shape[0]
    assert missing >= 0, "a basis has more directions than all factors"
    assert space.shape[1] == item.coordinates[1], "a basis has other directions than the factors"
    file.write(to_bytes(torch.zeros((missing, item.coordinates[1]), dtype=dtype)))
    spool.write(bytes(missing * len(touching) * item.masks[2][2]))
    return tuple((float(own), float(masked)) for own, masked in total.tolist())


def _sums(look: Look, touching: Sequence[int]) -> Tensor:
    """(T, 2), float64."""
    return torch.tensor([look.sums[adapter] for adapter in touching], dtype=torch.float64)


def _masks(look: Look, touching: Sequence[int]) -> Tensor:
    """(N, T, ceil(Q / 8)), uint8."""
    return torch.stack([pack_rows(look.masks[adapter]) for adapter in touching], dim=1)


def _padded(side: Tensor, shape: tuple[int, int]) -> Tensor:
    """`side` with columns of zeros up to `shape`."""
    return torch.nn.functional.pad(side, (0, shape[1] - side.shape[1]))
