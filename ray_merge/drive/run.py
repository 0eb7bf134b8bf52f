"""The loop of a run: what is missing -> pool -> receipts -> manifest.

    plan (headers) -> ids (content) -> what is there -> preflight -> probe -> units -> publish

Nothing is written before the probe. Every step can be repeated: a run that was killed anywhere is finished by
running the same recipe again, and a finished one is a no-op that does not even start a pool.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_merge.drive.events import Event
from ray_merge.drive.identify import Inputs, read_inputs_identity
from ray_merge.drive.learned import PHI, is_learned, phi_bytes
from ray_merge.drive.outputs import Target
from ray_merge.drive.preflight import preflight
from ray_merge.drive.publish import publish
from ray_merge.drive.resolved import resolved_recipe
from ray_merge.drive.result import MergeResult, RunResult
from ray_merge.drive.targets import find_targets
from ray_merge.drive.thresholds import THRESHOLDS, read_thresholds, select_thresholds, selecting, to_json
from ray_merge.drive.units import missing_units, object_names, tasks_of, total_bytes
from ray_merge.errors import Refusal, RunFailed
from ray_merge.methods.context import Thresholds
from ray_merge.plan import ADAPTER_OBJECT, Plan
from ray_merge.pool import Done, Pool
from ray_merge.spec import Merge, Receipt
from ray_merge.storage.commit import STATE_FOLDER, check_fit, commit_bytes, probe
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import Stores, open_store
from ray_merge.work.job import AdapterUnit, EmrUnit, Job, MomentsIndex, PhiIndex, ShardUnit, Unit

PoolFactory = Callable[[Job, int], Pool]
"""Makes the pool for a job of so many units; called only when there is something to do."""

Statistics = Mapping[str, MomentsIndex]
"""Moments by kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What merges need besides factors.

    Args:
        moments: by kind.
        phi: by merge name.
    """

    moments: Statistics = field(default_factory=dict)
    phi: Mapping[str, PhiIndex] = field(default_factory=dict)


Preparation = Callable[
    [Sequence[Merge], Mapping[str, str], Mapping[str, Mapping[str, Any]]],
    Callable[[Callable[[], None]], Prepared] | None,
]
"""(merges, their ids, what the ids say of each task's data) -> plans the moments and the learning that they need, with
every refusal that headers can show; what it returns finds or computes them. It is given what has to be called when the
data were looked at and before anything is learned: whether the outputs are fit.

None where they need none. Called only when there is something to do."""


def _nothing(_: Sequence[Merge], __: Mapping[str, str], ___: Mapping[str, Mapping[str, Any]]) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to run, as opposed to what.

    Args:
        cache: node-local folder for adapters, digests and, with a remote output, unfinished files.
        device: torch device of the workers.
        date: UTC day for `{date}` in `output`; today by default.
    """

    cache: Path
    device: str = "cpu"
    date: str | None = None


@dataclass(slots=True)
class _Open:
    """An unfinished merge: its target, what it still lacks, the receipts it has, attempts by object of this run."""

    merge: Merge
    target: Target
    missing: set[str]
    receipts: dict[str, Receipt] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    thresholds: Thresholds | None = None
    phi: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Context:
    """What every step of one run needs."""

    plan: Plan
    settings: Settings
    inputs: Inputs
    stores: Stores
    progress: Callable[[Event], None]
    warnings: list[str]
    base_bytes: Counter[str]
    prepare: Preparation


def run(
    plan: Plan,
    settings: Settings,
    make_pool: PoolFactory,
    progress: Callable[[Event], None] = lambda _: None,
    prepare: Preparation = _nothing,
) -> RunResult:
    """Complete every merge of the plan.

    Raises:
        Refusal: found before anything was written.
        RunFailed: found later; running again finishes what is left.
    """
    started = time.monotonic()
    stores = Stores()
    inputs = read_inputs_identity(plan, DigestCache(settings.cache / "digests"), stores)
    context = _Context(plan, settings, inputs, stores, progress, list(plan.warnings), Counter(), prepare)
    targets = find_targets(plan, inputs, settings.date, stores)
    unfinished = [
        _Open(merge, target, set(object_names(plan, merge)) - set(target.receipts), dict(target.receipts))
        for merge, target in zip(plan.merges, targets, strict=True)
        if not target.complete
    ]
    units_run = _finish(context, unfinished, make_pool) if unfinished else 0
    return RunResult(
        merges=tuple(
            MergeResult(name=merge.name, id=target.merge_id, url=target.url, done=not target.complete)
            for merge, target in zip(plan.merges, targets, strict=True)
        ),
        units_run=units_run,
        units_adopted=sum(len(item.target.receipts) for item in unfinished),
        seconds=time.monotonic() - started,
        read_bytes=context.base_bytes["read"],
        decoded_bytes=context.base_bytes["decoded"],
        warnings=tuple(context.warnings),
    )


def _finish(context: _Context, unfinished: Sequence[_Open], make_pool: PoolFactory) -> int:
    plan, settings, progress = context.plan, context.settings, context.progress
    job = Job(
        plan=plan,
        merge_ids={item.merge.name: item.target.merge_id for item in unfinished},
        outputs={item.merge.name: item.target.url for item in unfinished},
        roots={item.merge.name: item.target.root for item in unfinished},
        scratch=str(settings.cache / "scratch"),
        cache=str(settings.cache / "adapters"),
        attempt=uuid.uuid4().hex[:12],
        device=settings.device,
    )
    preparing = context.prepare(
        [item.merge for item in unfinished if item.missing], job.merge_ids, context.inputs.data
    )
    lacking = {item.merge.name: item.missing for item in unfinished}
    units = missing_units(plan, lacking)
    adapters = sorted({name for item in unfinished for name in item.merge.adapters if item.missing})
    all_bytes = total_bytes(plan, units)
    n_units = len(units)
    progress(
        Event(kind="start", text=_describe(units, unfinished), units=(0, n_units), n_bytes=(0, all_bytes))
    )
    try:
        if not units:
            with _later():
                _publish_ready(context, unfinished, (0, 0), (0, 0))
            return 0
        checked = preparing is not None
        if preparing is not None:
            # Adapters are looked at before anything is made of them; the workers cannot do both at once.
            with make_pool(job, len(adapters)) as pool:
                preflight(pool, adapters, context.inputs, [item.merge for item in unfinished])
            prepared = preparing(lambda: _check_outputs(context, unfinished))
            job = replace(job, moments=prepared.moments, phi=prepared.phi)
            for item in unfinished:
                if item.merge.name in prepared.phi:
                    item.phi = phi_bytes(prepared.phi[item.merge.name], item.merge, context.stores)
        with make_pool(job, max(len(units), len(adapters))) as pool:
            if not checked:
                preflight(pool, adapters, context.inputs, [item.merge for item in unfinished])
            _select(context, unfinished, pool)
            with _later() if checked else nullcontext():  # moments and phi are in the store by now
                for item in unfinished:
                    _probe(context, item)
            with _later():
                units = missing_units(plan, lacking, _thresholds(unfinished))
                _publish_ready(context, unfinished, (0, n_units), (0, all_bytes))
                written = 0
                by_id = {unit.id: unit for unit in units}
                by_name = {item.merge.name: item for item in unfinished}
                for count, done in enumerate(pool.run(tasks_of(plan, units)), start=1):
                    written += _note_receipts(by_name, by_id[done.id], done)
                    context.base_bytes.update(done.value[0].unit_bytes)
                    numbers = ((count, n_units), (written, all_bytes))
                    progress(Event(kind="unit", text=done.id, units=numbers[0], n_bytes=numbers[1]))
                    _publish_ready(context, unfinished, *numbers)
    finally:
        _sweep(job)
    return n_units


@contextmanager
def _later() -> Iterator[None]:
    """What is refused after the first object was written (credentials that expired) is a failed run."""
    try:
        yield
    except Refusal as error:
        raise RunFailed(f"{error}; run the recipe again to finish it") from error


def _select(context: _Context, unfinished: Sequence[_Open], pool: Pool) -> None:
    """Find the thresholds that merges need over the whole model, but for those that an earlier run committed."""
    by_name = {item.merge.name: item for item in unfinished if item.missing}
    wanted = selecting([item.merge for item in by_name.values()])
    for merge in wanted:
        store = context.stores.open(by_name[merge.name].target.url)
        by_name[merge.name].thresholds = read_thresholds(store, merge)
    new = [merge for merge in wanted if by_name[merge.name].thresholds is None]
    for name, thresholds in select_thresholds(context.plan, new, pool, context.progress).items():
        by_name[name].thresholds = thresholds


def _thresholds(unfinished: Sequence[_Open]) -> dict[str, Thresholds]:
    return {item.merge.name: item.thresholds for item in unfinished if item.thresholds is not None}


def _describe(units: Sequence[Unit], unfinished: Sequence[_Open]) -> str:
    there = sum(len(item.receipts) for item in unfinished)
    again = f", {there} object(s) are there already" if there else ""
    return f"{len(units)} unit(s) for {len(unfinished)} merge(s){again}"


def _check_outputs(context: _Context, unfinished: Sequence[_Open]) -> None:
    """Refuse an output that is unfit before learning, which may take hours; each merge is probed when it is made."""
    for root in dict.fromkeys(
        item.target.root for item in unfinished if item.missing and is_learned(item.merge)
    ):
        check_fit(context.stores.open(root))


def _probe(context: _Context, item: _Open) -> None:
    recipe = resolved_recipe(context.plan, item.merge, item.target.merge_id)
    store = context.stores.open(item.target.url)
    if probe(store, recipe, item.target.merge_id) and item.target.receipts:
        raise RunFailed(
            f"{store.url}: what an earlier run had published there was removed since this one began; run the recipe "
            "again"
        )
    if item.thresholds is not None:
        commit_bytes(store, THRESHOLDS, to_json(item.merge, item.thresholds), item.target.merge_id)
    if item.phi is not None:
        commit_bytes(store, PHI, item.phi, item.target.merge_id)


def _note_receipts(
    unfinished: Mapping[str, _Open], unit: ShardUnit | EmrUnit | AdapterUnit, done: Done
) -> int:
    # By name and not by id: merges that say the same in two ways have one id and a folder each.
    names = unit.merges if isinstance(unit, ShardUnit) else (unit.merge,)
    receipts: Sequence[Receipt] = done.value
    for name, receipt in zip(names, receipts, strict=True):
        unfinished[name].receipts[receipt.name] = receipt
        unfinished[name].attempts[receipt.name] = done.attempts
        unfinished[name].missing.discard(receipt.name)
    return sum(receipt.n_bytes for receipt in receipts if receipt.name != ADAPTER_OBJECT)


def _publish_ready(
    context: _Context,
    unfinished: Sequence[_Open],
    units: tuple[int, int],
    n_bytes: tuple[int, int],
) -> None:
    for item in unfinished:
        if not item.missing and item.receipts:
            context.warnings.extend(
                publish(
                    context.plan,
                    item.merge,
                    item.target,
                    item.receipts,
                    item.attempts,
                    context.stores,
                    context.settings.cache / "adapters",
                )
            )
            item.receipts.clear()
            context.progress(Event(kind="merge", text=item.merge.name, units=units, n_bytes=n_bytes))


def _sweep(job: Job) -> None:
    """Remove this run's unfinished files; the folders around them stay, since another run may be about to use them."""
    roots = {open_store(root).local_root for root in job.roots.values()}
    for folder in [Path(job.scratch) if root is None else root / STATE_FOLDER for root in roots]:
        shutil.rmtree(folder / "attempts" / job.attempt, ignore_errors=True)
