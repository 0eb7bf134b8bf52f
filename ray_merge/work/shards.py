"""One shard unit: base tensors are read once, every merge of the group gets its own file from them.

Tensors go by in file order. One that no adapter touches is passed on as bytes. A touched one is taken site by
site in row chunks: base rows + update rows, rounded once (algebra/rounding.py), appended to the merge's scratch
file; trained token rows are written over the result. Merges that begin a tensor from different values (an
adapter's saved embedding) read it apart.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.grid import chunk_rows
from ray_merge.algebra.rounding import Rounding, add_update
from ray_merge.errors import RunFailed
from ray_merge.methods.context import Thresholds
from ray_merge.plan import SHARD_METADATA, OutTensor, Shard, shard_layout
from ray_merge.pool import Turn, worker_label
from ray_merge.spec import DTYPE_BYTES, Merge, Receipt, Site, SiteReport
from ray_merge.storage.commit import commit, put_receipt
from ray_merge.storage.store import Stores
from ray_merge.storage.stream import Reader
from ray_merge.storage.writer import ScratchFile, WriteBehind
from ray_merge.work.deltas import site_deltas
from ray_merge.work.diagnostics import Diagnosis
from ray_merge.work.factors import AdapterFiles, token_rows
from ray_merge.work.job import Job, ShardUnit
from ray_merge.work.scratch import scratch_folder
from ray_merge.work.sources import Sources, check_base, open_base
from ray_merge.work.tensors import TORCH_DTYPES, from_bytes, to_bytes


@dataclass(slots=True)
class _Output:
    """One merge's file of the unit, while it grows."""

    merge: Merge
    tensors: tuple[OutTensor, ...]
    sites: dict[str, list[Site]]
    file: ScratchFile
    reports: list[SiteReport] = field(default_factory=list)


class _Clock:
    """Seconds by phase; what overlaps is counted where the worker waited."""

    def __init__(self) -> None:
        self.began = round(time.time(), 3)
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> float:
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        self.seconds[phase] += passed
        return passed


@dataclass(frozen=True, slots=True)
class _Unit:
    """What every step of one unit needs."""

    job: Job
    files: AdapterFiles
    sources: Sources
    clock: _Clock
    thresholds: Mapping[str, Thresholds]


def run_shard(job: Job, unit: ShardUnit, files: AdapterFiles, stores: Stores, turn: Turn) -> list[Receipt]:
    """Make, publish and receipt one shard for every merge of the unit; the turn ends before the publishing."""
    plan, shard = job.plan, job.plan.shards[unit.shard]
    merges = [merge for merge in plan.merges if merge.name in unit.merges]
    clock = _Clock()
    with ExitStack() as stack:
        behind = WriteBehind(turn.check)
        outputs = [stack.enter_context(_output(job, shard, merge, behind)) for merge in merges]
        stack.enter_context(behind)  # last, so that nothing is queued when the files are discarded
        base = open_base(stores, plan.base)
        check_base(base, plan.base, shard)
        sources = Sources(plan.base, stack.enter_context(Reader(base)), files)
        context = _Unit(job, files, sources, clock, unit.thresholds)
        for position in range(len(shard.tensors)):
            for tensor, alike in _by_source(outputs, position):
                _write_tensor(context, tensor, alike)
        check_base(base, plan.base, shard)
        turn.end()
        return [_publish(context, unit, shard, output, stores) for output in outputs]


@contextmanager
def _output(job: Job, shard: Shard, merge: Merge, behind: WriteBehind) -> Iterator[_Output]:
    name = f"{job.merge_ids[merge.name][:12]}-{shard.name}"
    path = scratch_folder(job, merge.name) / f"{name}-{uuid.uuid4().hex[:8]}"
    tensors = job.plan.tensors(merge, shard)
    sites: dict[str, list[Site]] = defaultdict(list)
    for site in job.plan.touched(merge):
        sites[site.tensor].append(site)
    file = ScratchFile(path, shard_layout(tensors), SHARD_METADATA, behind)
    try:
        yield _Output(merge, tensors, sites, file)
    finally:
        file.discard()


def _by_source(outputs: Sequence[_Output], position: int) -> list[tuple[OutTensor, list[_Output]]]:
    """The outputs by what their tensor at `position` begins from."""
    # A convolution is one site of whole rows for one adapter and slabs for another (target_parameters): apart too.
    groups: dict[tuple[OutTensor, frozenset[int]], list[_Output]] = defaultdict(list)
    for output in outputs:
        tensor = output.tensors[position]
        widths = frozenset(site.shape[1] for site in output.sites.get(tensor.name, ()))
        groups[tensor, widths].append(output)
    return [(tensor, alike) for (tensor, _), alike in groups.items()]


def _write_tensor(unit: _Unit, tensor: OutTensor, outputs: Sequence[_Output]) -> None:
    """Stream one tensor through every merge that begins it from the same values."""
    sites = {site.name: site for output in outputs for site in output.sites.get(tensor.name, ())}
    tokens = [_Tokens.of(unit, tensor, output.merge) for output in outputs]
    if not sites and not any(tokens):
        _pass_through(unit, tensor, outputs)
        return
    columns = next(iter(sites.values())).shape[1] if sites else tensor.shape[-1]
    writers = [_Writer(output, tensor, rows) for output, rows in zip(outputs, tokens, strict=True)]
    position, end = 0, tensor.source.n_bytes // DTYPE_BYTES[tensor.source.dtype] // columns
    for site in sorted(sites.values(), key=lambda site: site.start):
        _write_rows(unit, tensor, (position, site.start), columns, writers)
        _write_site(unit, tensor, site, writers)
        position = site.start + site.shape[0]
    _write_rows(unit, tensor, (position, end), columns, writers)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Rows of one table that a merge sets: row number -> values in the stored dtype."""

    rows: dict[int, Tensor]

    @classmethod
    def of(cls, unit: _Unit, tensor: OutTensor, merge: Merge) -> _Tokens | None:
        """The trained rows of `tensor`, read from the adapters that have some."""
        rows: dict[int, Tensor] = {}
        for name, entry, indices in token_rows(unit.job.plan.adapters, merge.adapters, tensor.name):
            values = _cast(unit.files.saved(name).read(entry), replace(tensor, owner=name))
            rows |= dict(zip(indices, values, strict=True))
        return cls(rows) if rows else None

    def put(self, stored_NI: Tensor, start: int) -> Tensor:
        """`stored_NI`, whose first row is row `start` of the table, with the trained rows in it."""
        inside = [row for row in self.rows if start <= row < start + stored_NI.shape[0]]
        if not inside:
            return stored_NI
        changed_NI = stored_NI.clone()
        for row in inside:
            changed_NI[row - start] = self.rows[row].to(changed_NI.device)
        return changed_NI


@dataclass(frozen=True, slots=True)
class _Writer:
    """Appends rows of one tensor to one merge's file."""

    output: _Output
    tensor: OutTensor
    tokens: _Tokens | None

    def write(self, stored_NI: Tensor, start: int) -> None:
        """Append rows in the stored dtype; `start` is the number of the first."""
        rows_NI = stored_NI if self.tokens is None else self.tokens.put(stored_NI, start)
        self.output.file.write(to_bytes(rows_NI))


def _pass_through(unit: _Unit, tensor: OutTensor, outputs: Sequence[_Output]) -> None:
    source = tensor.source
    for data in unit.sources.raw(tensor):
        unit.clock.lap("read")
        if isinstance(data, Tensor):
            stored = to_bytes(_cast(data, tensor))
        elif tensor.dtype != source.dtype:
            n_items = len(data) // DTYPE_BYTES[source.dtype]
            stored = to_bytes(_cast(from_bytes(data, TORCH_DTYPES[source.dtype], (n_items,)), tensor))
        else:
            stored = memoryview(data)
        for output in outputs:
            output.file.write(stored)
        unit.clock.lap("write")


def _cast(given: Tensor, tensor: OutTensor) -> Tensor:
    stored = given.to(TORCH_DTYPES[tensor.dtype])
    if stored.dtype != given.dtype and bool((stored.isinf() & ~given.isinf()).any()):
        whose = f"adapter {tensor.owner}" if tensor.owner else "the base"
        raise RunFailed(
            f"{tensor.name} of {whose} holds values that do not fit {tensor.dtype}; use out_dtype: bfloat16 or float32"
        )
    return stored


def _write_rows(
    unit: _Unit, tensor: OutTensor, rows: tuple[int, int], columns: int, writers: Sequence[_Writer]
) -> None:
    """Rows of a tensor that no site covers, in its other experts or around trained tokens."""
    spans = unit.sources.spans(tensor, rows, columns, 1)
    for (start, _), given_NI in zip(spans, unit.sources.rows(tensor, spans, columns), strict=True):
        unit.clock.lap("read")
        stored_NI = _cast(given_NI, tensor)
        for writer in writers:
            writer.write(stored_NI, start)
        unit.clock.lap("write")


def _write_site(unit: _Unit, tensor: OutTensor, site: Site, writers: Sequence[_Writer]) -> None:
    """Stream one site through every merge: the base's rows are read and decoded once."""
    device, clock = unit.job.device, unit.clock
    touching = [writer for writer in writers if site in writer.output.sites.get(tensor.name, ())]
    others = [writer for writer in writers if writer not in touching]
    whole = (site.start, site.start + site.shape[0])
    base = partial(unit.sources.matrix, tensor, whole, site.shape[1])
    merges = [writer.output.merge for writer in touching]
    deltas = site_deltas(site, merges, unit.files, base, unit.thresholds)
    recipe = unit.job.plan.recipe
    diagnosis = Diagnosis(recipe, site, merges, unit.files, base) if recipe.diagnostics else None
    sums = [Rounding() for _ in touching]
    seconds = clock.lap("merge")
    spans = unit.sources.spans(tensor, whole, site.shape[1], chunk_rows(site.shape[1]))
    for (start, stop), given_NI in zip(spans, unit.sources.rows(tensor, spans, site.shape[1]), strict=True):
        clock.lap("read")
        if diagnosis is not None:
            diagnosis.add(given_NI)
            clock.lap("diagnose")
        for first, last in _chunks(start, stop, site):
            base_NI = given_NI[first - start : last - start].to(device)
            for writer, delta, total in zip(touching, deltas, sums, strict=True):
                update_NI = delta.rows(first - site.start, last - site.start)
                stored_NI = add_update(base_NI, update_NI, TORCH_DTYPES[tensor.dtype], total)
                seconds += clock.lap("merge")
                writer.write(stored_NI, first)
                clock.lap("write")
        if others:
            same_NI = _cast(given_NI, tensor)
            for writer in others:
                writer.write(same_NI, start)
            clock.lap("write")
    for writer, delta, total in zip(touching, deltas, sums, strict=True):
        report = _report(site, writer.output.merge, delta, total, tensor, seconds / len(touching))
        if diagnosis is not None:
            report = replace(report, figures=diagnosis.figures(writer.output.merge.adapters))
            clock.lap("diagnose")
        writer.output.reports.append(report)


def _chunks(start: int, stop: int, site: Site) -> Iterator[tuple[int, int]]:
    """Rows that were read together, by the chunks in which the site's updates are computed."""
    step = chunk_rows(site.shape[1])
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _report(
    site: Site, merge: Merge, delta: Delta, total: Rounding, tensor: OutTensor, seconds: float
) -> SiteReport:
    if not total.finite:
        raise RunFailed(
            f"merge {merge.name!r}: {site.name} is not finite after the merge: the base holds NaN or Inf, a DoRA row "
            f"has the norm 0, or the result does not fit {tensor.dtype}; check the base, or use out_dtype: float32"
        )
    return SiteReport(
        site=site.name,
        tensor=site.tensor,
        rank=delta.rank,
        update_norm=total.update_norm,
        lost_share=total.lost_share,
        truncation_error=delta.truncation_error,
        n_bytes=site.shape[0] * site.shape[1] * DTYPE_BYTES[tensor.dtype],
        seconds=round(seconds, 6),
    )


def _publish(context: _Unit, unit: ShardUnit, shard: Shard, output: _Output, stores: Stores) -> Receipt:
    job, clock = context.job, context.clock
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
        tensors=len(output.tensors),
        unit=unit.id,
        sites=tuple(output.reports),
        began=clock.began,
        seconds={phase: round(seconds, 3) for phase, seconds in sorted(clock.seconds.items())},
        unit_bytes={"read": context.sources.n_read, "decoded": context.sources.n_decoded},
        worker=worker_label(),
        adopted=adopted,
    )
    return put_receipt(store, receipt)
