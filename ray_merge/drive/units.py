"""Which units a run consists of: from objects that are missing to work for the pool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ray_merge.methods.context import Thresholds
from ray_merge.plan import ADAPTER_OBJECT, Plan
from ray_merge.plan.emr import emr_bytes, emr_object
from ray_merge.pool import Task
from ray_merge.spec import Merge
from ray_merge.work.job import AdapterUnit, EmrUnit, ShardUnit, Unit


def object_names(plan: Plan, merge: Merge) -> list[str]:
    """The objects of a merge that units make."""
    shards = [shard.name for shard in plan.shards] if merge.export != "adapter" else []
    emr = [emr_object(plan.shards[index]) for index in emr_bytes(plan, merge)]
    return shards + emr + ([ADAPTER_OBJECT] if merge.export != "checkpoint" else [])


def missing_units(
    plan: Plan, missing: Mapping[str, Iterable[str]], thresholds: Mapping[str, Thresholds] | None = None
) -> list[ShardUnit | EmrUnit | AdapterUnit]:
    """Units that make the missing objects; the merges of a group share one unit per shard.

    Args:
        plan: the run's plan.
        missing: merge name -> object names that have no receipt yet.
        thresholds: of the merges that select over the whole model.
    """
    found = thresholds or {}
    lacking = {name: set(objects) for name, objects in missing.items()}
    units: list[ShardUnit | EmrUnit | AdapterUnit] = []
    for group, indices in enumerate(plan.groups):
        names = [plan.merges[index].name for index in indices]
        for shard in plan.shards:
            wanted = tuple(name for name in names if shard.name in lacking.get(name, ()))
            if wanted:
                units.append(ShardUnit(shard.index, wanted, group, _of(found, wanted)))
    units += [
        EmrUnit(merge.name, shard.index)
        for merge in plan.merges
        for shard in plan.shards
        if emr_object(shard) in lacking.get(merge.name, ())
    ]
    adapters = [merge for merge in plan.merges if ADAPTER_OBJECT in lacking.get(merge.name, ())]
    return units + [AdapterUnit(merge.name, _of(found, (merge.name,))) for merge in adapters]


def tasks_of(plan: Plan, units: Sequence[ShardUnit | EmrUnit | AdapterUnit]) -> list[Task]:
    """Tasks whose data are the adapters of their merges: what a node's cache has once it ran one of them."""
    used = {merge.name: merge.adapters for merge in plan.merges}
    names = [unit.merges if isinstance(unit, ShardUnit) else (unit.merge,) for unit in units]
    # One set for all units of the same merges: sets of 128 names for 100,000 units would take 0.8 GB.
    data = {own: frozenset(adapter for name in own for adapter in used[name]) for own in names}
    return [Task(unit.id, unit, data[own]) for unit, own in zip(units, names, strict=True)]


def _of(thresholds: Mapping[str, Thresholds], names: Sequence[str]) -> dict[str, Thresholds]:
    return {name: thresholds[name] for name in names if name in thresholds}


def total_bytes(plan: Plan, units: Sequence[Unit]) -> int:
    """Bytes of the shards and emr objects that units make; ranks decide how large an exported adapter is."""
    emr = {merge.name: emr_bytes(plan, merge) for merge in plan.merges}
    shards = [unit for unit in units if isinstance(unit, ShardUnit)]
    return sum(plan.shards[unit.shard].n_bytes * len(unit.merges) for unit in shards) + sum(
        emr[unit.merge][unit.shard] for unit in units if isinstance(unit, EmrUnit)
    )
