"""How long a plan takes on a cluster: a model of bytes and arithmetic, without torch and without a look at weights.

Reading runs ahead of the arithmetic and a shard is uploaded when it is finished, so a worker needs

    max(read, arithmetic) + write

and the cluster as many rounds of that as it has units for each worker. Every worker is taken to be a node of its own,
which fetches every adapter once. Starting Ray, retries and throttling of a store are not in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ray_merge.errors import Refusal, shown
from ray_merge.methods.cost import made
from ray_merge.methods.declare import Method
from ray_merge.methods.registry import get, selects_over_model
from ray_merge.plan.kinds import Kind, SiteKinds
from ray_merge.plan.plan import Plan
from ray_merge.recipe import parse_size
from ray_merge.spec import Merge

ROUND_FLOPS = 100
"""Of one entry of a touched weight in each merge: decode, add, round, measure the loss (1.1 ms for a million entries),
as arithmetic that takes as long; methods/cost.py has what it is measured against, and what the methods take."""

SELECT_ROUNDS = {"dense": 2, "core": 3, "knots": 3}
"""How often the coordinates of all adapters are made for `scope: model` (drive/thresholds.py): float32, float64. What
it takes to count them is in `Method.work`: a merge with `scope: tensor` counts them by itself."""

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a run would have.

    Args:
        workers: processes that merge at the same time.
        read_bytes_per_second, write_bytes_per_second: of one worker, from and to the store.
        flops_per_second: of one worker, in float32 products of matrices. A core of today's servers reaches some 90e9.
    """

    workers: int = 8
    read_bytes_per_second: int = 250 * 10**6
    write_bytes_per_second: int = 125 * 10**6
    flops_per_second: float = 90e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a plan takes.

    Args:
        cluster: on what.
        read_bytes: from the store: the base once for each group, every adapter once for each worker.
        write_bytes: to the store.
        flops: of all merges.
        read_hours, arithmetic_hours, write_hours: what each takes by itself, all workers busy to the end.
        hours: what all takes together.
        bound_by: the largest of the three: "read", "arithmetic" or "write".
        units: pieces of work.
        peak_bytes_per_worker: of memory.
        cluster_memory_bytes: of all workers.
    """

    cluster: Cluster
    read_bytes: int
    write_bytes: int
    flops: float
    read_hours: float
    arithmetic_hours: float
    write_hours: float
    hours: float
    bound_by: str
    units: int
    peak_bytes_per_worker: int
    cluster_memory_bytes: int


def parse_cluster(text: str) -> Cluster:
    """The cluster that `workers=64,read=1GB/s,write=500MB/s,flops=2T` describes; what is left out has its default.

    Raises:
        Refusal: another key, or a value that is none.
    """
    given: dict[str, int | float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (word.strip() for word in part.partition("="))
        name = _FIELDS.get(key)
        if name is None or name in given:
            what = "no known key" if name is None else "given twice"
            raise Refusal(f"--cluster: {shown(key)} is {what}; write for example {EXAMPLE}")
        given[name] = _value(key, value)
    return Cluster(**given)  # type: ignore[arg-type]  # each by its own rule in _value


EXAMPLE = "workers=64,read=1GB/s,write=500MB/s,flops=2T"

_FIELDS = {
    "workers": "workers", "read": "read_bytes_per_second", "write": "write_bytes_per_second",
    "flops": "flops_per_second",
}  # fmt: skip

_PREFIXES = {"": 1e0, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


def _value(key: str, value: str) -> int | float:
    if key == "workers" and re.fullmatch(r"[1-9][0-9]{0,5}", value):
        return int(value)
    flops = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([MGTP]?)(?:FLOPS?(?:/s)?)?", value, re.IGNORECASE)
    if key == "flops" and flops and float(flops[1]) > 0:
        return float(flops[1]) * _PREFIXES[flops[2].upper()]
    if key in ("read", "write"):
        try:
            return parse_size(value.removesuffix("/s"))
        except ValueError:
            pass
    raise Refusal(f"--cluster: {key}={shown(value)} is no value for it; write for example {EXAMPLE}")


def estimate(plan: Plan, cluster: Cluster) -> Estimate:
    """What `plan` takes on `cluster`."""
    busy = min(cluster.workers, max(1, plan.n_units))
    read_bytes = plan.read_bytes + plan.adapter_bytes * busy
    write_bytes = plan.write_bytes + exported_bytes(plan)
    arithmetic = flops(plan)
    # The last round leaves workers idle: 65 units on 64 workers take as long as 128.
    rounds = math.ceil(plan.n_units / busy)
    share = rounds / plan.n_units if plan.n_units else 1.0
    hours = {
        "read": (plan.read_bytes * share + plan.adapter_bytes)
        / cluster.read_bytes_per_second
        / SECONDS_PER_HOUR,
        "arithmetic": arithmetic * share / cluster.flops_per_second / SECONDS_PER_HOUR,
        "write": write_bytes * share / cluster.write_bytes_per_second / SECONDS_PER_HOUR,
    }
    return Estimate(
        cluster=cluster,
        read_bytes=read_bytes,
        write_bytes=write_bytes,
        flops=arithmetic,
        read_hours=hours["read"],
        arithmetic_hours=hours["arithmetic"],
        write_hours=hours["write"],
        hours=max(hours["read"], hours["arithmetic"]) + hours["write"],
        bound_by=max(hours, key=lambda word: hours[word]),
        units=plan.n_units,
        peak_bytes_per_worker=plan.peak_bytes,
        cluster_memory_bytes=plan.peak_bytes * busy,
    )


def flops(plan: Plan) -> float:
    """Floating-point operations of all merges of a plan, each counted by itself, and of what they select once."""
    kinds = SiteKinds(plan.adapters, plan.sites, plan.base.tensors)
    of_set = {names: kinds.of(names) for names in dict.fromkeys(merge.adapters for merge in plan.merges)}
    known: dict[tuple[str, str, tuple[str, ...]], float] = {}
    total = 0.0
    for merge in plan.merges:
        method, space = get(merge.method), _space(merge)
        key = (method.name, space, merge.adapters)
        if key not in known:
            known[key] = sum(
                count * site_flops(method, space, (kinds.seen_by(method, shape), ranks, needed))
                for (shape, ranks, needed), count in of_set[merge.adapters].items()
            )
        total += known[key]
    return total + selection_flops(plan.merges, kinds)


def site_flops(method: Method, space: str, kind: Kind) -> float:
    """Floating-point operations of one merge at one site."""
    shape, ranks, _ = kind
    return ROUND_FLOPS * shape[0] * shape[1] + method.work(space, shape, ranks)


def selection_flops(merges: Sequence[Merge], kinds: SiteKinds) -> float:
    """Floating-point operations of the rounds before merges that select entries over the whole model.

    Merges with the same coordinates are counted together: those of an adapter's delta are its own, those in a basis
    belong to all adapters of a merge.
    """
    selecting = [merge for merge in merges if selects_over_model(get(merge.method), merge.parameters)]
    alone = dict.fromkeys(name for merge in selecting if _space(merge) == "dense" for name in merge.adapters)
    together = dict.fromkeys((space, m.adapters) for m in selecting if (space := _space(m)) != "dense")
    return sum(
        count * SELECT_ROUNDS[space] * made(space, shape, ranks)
        for space, names in (("dense", tuple(alone)), *together)
        for (shape, ranks, _), count in kinds.of(names).items()
    )


def _space(merge: Merge) -> str:
    return str(merge.parameters.get("space", get(merge.method).spaces[0]))


def exported_bytes(plan: Plan) -> int:
    """Bytes of the exported adapters in float32, at the rank of all factors together or at the rank asked for."""
    exported = [merge for merge in plan.merges if merge.export != "checkpoint"]
    if not exported:
        return 0
    kinds = SiteKinds(plan.adapters, plan.sites, plan.base.tensors)
    return sum(_adapter_bytes(merge, kinds) for merge in exported)


def _adapter_bytes(merge: Merge, kinds: SiteKinds) -> int:
    total = 0
    for ((O, I), ranks, _), count in kinds.of(merge.adapters).items():  # noqa: E741
        rank = min(sum(ranks), O, I, merge.export_rank or sum(ranks))
        total += 4 * count * rank * (O + I)
    return total
