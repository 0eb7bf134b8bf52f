"""One shard unit: base tensors are read once, every merge of the group gets its own file from them.

Tensors go by in file order. One that no adapter touches is passed on as bytes; a touched one is taken in row
chunks: base rows + update rows, rounded once (algebra/rounding.py), appended to the merge's scratch file.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.grid import chunk_rows
from ray_merge.algebra.rounding import Rounding, add_update
from ray_merge.algebra.site import SiteFactors
from ray_merge.errors import RunFailed
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.registry import get
from ray_merge.methods.resolve import at_site
from ray_merge.plan import SHARD_METADATA, OutTensor, Shard, shard_layout
from ray_merge.pool import worker_label
from ray_merge.spec import DTYPE_BYTES, Merge, Receipt, Site, SiteReport
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.commit import commit, put_receipt
from ray_merge.storage.store import Store, Stores
from ray_merge.storage.stream import Reader, byte_chunks, row_chunks, rows_to_bytes
from ray_merge.storage.writer import ScratchFile
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.job import Job, ShardUnit
from ray_merge.work.scratch import scratch_folder
from ray_merge.work.tensors import TORCH_DTYPES, from_bytes, to_bytes


@dataclass(slots=True)
class _Output:
    """One merge's file of the unit, while it grows."""

    merge: Merge
    touched: set[str]
    file: ScratchFile
    reports: list[SiteReport] = field(default_factory=list)


class _Clock:
    """Seconds by phase; what overlaps is counted where the worker waited."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def run_shard(job: Job, unit: ShardUnit, files: AdapterFiles, stores: Stores) -> list[Receipt]:
    """Make, publish and receipt one shard for every merge of the unit."""
    plan, shard = job.plan, job.plan.shards[unit.shard]
    merges = [merge for merge in plan.merges if merge.name in unit.merges]
    clock = _Clock()
    with ExitStack() as stack:
        outputs = [stack.enter_context(_output(job, shard, merge)) for merge in merges]
        base = stores.open(plan.base.url)
        _check_base(base, plan.base, {tensor.source.file for tensor in shard.tensors})
        reader = stack.enter_context(Reader(base))
        for tensor in shard.tensors:
            touching = [output for output in outputs if tensor.source.name in output.touched]
            if touching:
                _merge_tensor(job, tensor, outputs, touching, reader, files, clock)
            else:
                _pass_through(tensor, outputs, reader, clock)
        return [_publish(job, unit, shard, output, clock, stores) for output in outputs]


def _check_base(store: Store, base: Checkpoint, names: set[str]) -> None:
    for planned in base.weight_files:
        if planned.path in names and store.info(planned.path) != planned:
            raise RunFailed(f"{base.url}/{planned.path} has changed since the run was planned; run again")


@contextmanager
def _output(job: Job, shard: Shard, merge: Merge) -> Iterator[_Output]:
    name = f"{job.merge_ids[merge.name][:12]}-{shard.name}"
    path = scratch_folder(job, merge.name) / f"{name}-{uuid.uuid4().hex[:8]}"
    file = ScratchFile(path, shard_layout(shard.tensors), SHARD_METADATA)
    try:
        yield _Output(merge, job.plan.touched(merge), file)
    finally:
        file.discard()


def _pass_through(tensor: OutTensor, outputs: Sequence[_Output], reader: Reader, clock: _Clock) -> None:
    source = tensor.source
    requests = [(source.file, start, end) for start, end in byte_chunks(source)]
    for data in reader.stream(requests):
        clock.lap("read")
        stored = data if tensor.dtype == source.dtype else _cast(data, tensor)
        for output in outputs:
            output.file.write(stored)
        clock.lap("write")


def _cast(data: bytes, tensor: OutTensor) -> memoryview:
    source = tensor.source
    given = from_bytes(data, source.dtype, (len(data) // DTYPE_BYTES[source.dtype],))
    stored = given.to(TORCH_DTYPES[tensor.dtype])
    if bool((stored.isinf() & ~given.isinf()).any()):
        raise RunFailed(
            f"{source.name} of the base holds values that do not fit {tensor.dtype}; use out_dtype: bfloat16 or float32"
        )
    return to_bytes(stored)


def _merge_tensor(
    job: Job,
    tensor: OutTensor,
    outputs: Sequence[_Output],
    touching: Sequence[_Output],
    reader: Reader,
    files: AdapterFiles,
    clock: _Clock,
) -> None:
    """Stream one touched weight through every merge: the base's rows are read and decoded once."""
    source, site = tensor.source, job.plan.sites[tensor.source.name]
    deltas = site_deltas(site, [output.merge for output in touching], files)
    sums = [Rounding() for _ in touching]
    clock.lap("merge")
    rows = row_chunks(source, chunk_rows(site.shape[1]))
    requests = [(source.file, start, end) for start, end in rows_to_bytes(source, rows)]
    untouched = [output for output in outputs if source.name not in output.touched]
    for (start, stop), data in zip(rows, reader.stream(requests), strict=True):
        clock.lap("read")
        base_NI = from_bytes(data, source.dtype, (stop - start, site.shape[1])).to(job.device)
        clock.lap("merge")
        for output, delta, total in zip(touching, deltas, sums, strict=True):
            stored_NI = add_update(base_NI, delta.rows(start, stop), TORCH_DTYPES[tensor.dtype], total)
            clock.lap("merge")
            output.file.write(to_bytes(stored_NI))
            clock.lap("write")
        if untouched:
            same = data if tensor.dtype == source.dtype else _cast(data, tensor)
            for output in untouched:
                output.file.write(same)
            clock.lap("write")
    for output, delta, total in zip(touching, deltas, sums, strict=True):
        output.reports.append(_report(site, output.merge, delta, total, tensor.dtype))


def site_deltas(site: Site, merges: Sequence[Merge], files: AdapterFiles) -> list[Delta]:
    """The update of one site in each merge; merges of the same adapters share factors and bases."""
    shared: dict[tuple[str, ...], SiteFactors] = {}
    deltas = []
    for merge in merges:
        if merge.adapters not in shared:
            shared[merge.adapters] = files.site(merge.adapters, site.name, site.shape)
        parameters = at_site(get(merge.method), merge.parameters, merge.adapters, site.name)
        deltas.append(
            merge_site(
                merge.method,
                shared[merge.adapters],
                parameters,
                names=merge.adapters,
                site=site.name,
                seed=merge.seed,
            )
        )
    return deltas


def _report(site: Site, merge: Merge, delta: Delta, total: Rounding, dtype: str) -> SiteReport:
    if not total.finite:
        raise RunFailed(
            f"merge {merge.name!r}: {site.tensor} is not finite after the merge: the base holds NaN or Inf, or "
            f"the result does not fit {dtype}; check the base, or use out_dtype: float32"
        )
    return SiteReport(
        site=site.name,
        tensor=site.tensor,
        rank=delta.rank,
        update_norm=total.update_norm,
        lost_share=total.lost_share,
        truncation_error=delta.truncation_error,
    )


def _publish(
    job: Job, unit: ShardUnit, shard: Shard, output: _Output, clock: _Clock, stores: Stores
) -> Receipt:
    merge_id = job.merge_ids[output.merge.name]
    store = stores.open(job.outputs[output.merge.name])
    sha256 = output.file.close()
    adopted = commit(store, shard.name, output.file.path, sha256=sha256, merge_id=merge_id)
    clock.lap("upload")
    receipt = Receipt(
        merge_id=merge_id,
        name=shard.name,
        n_bytes=output.file.n_bytes,
        sha256=sha256,
        tensors=len(shard.tensors),
        unit=unit.id,
        sites=tuple(output.reports),
        seconds={phase: round(seconds, 3) for phase, seconds in sorted(clock.seconds.items())},
        worker=worker_label(),
        adopted=adopted,
    )
    return put_receipt(store, receipt)
