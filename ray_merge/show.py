"""What the commands print: tables on stdout, progress on stderr (live on a terminal, plain lines otherwise)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ray_merge import logs
from ray_merge.fit.ranked import RankedFactors
from ray_merge.methods.gradient import has_gradient
from ray_merge.plan.estimate import Cluster, estimate
from ray_merge.show_progress import human_bytes
from ray_merge.spec import Adapter, FactorEntry, SavedEntry, Update

if TYPE_CHECKING:
    from ray_merge.drive.result import RunResult
    from ray_merge.plan import Plan
    from ray_merge.verify import Verified

MAX_NAMES_SHOWN = 6

MAX_ADAPTERS_SHOWN = 12
"""Of one merge; --json lists all."""

PIPE_WIDTH = 160
"""A pipe has no width of its own; 80 would cut the words."""


def plan_json(plan: Plan, cluster: Cluster | None = None) -> dict[str, Any]:
    """A plan as JSON-able data, with what it would take on `cluster`."""
    # Adapters with equal headers share one mapping.
    different = {id(adapter.factors): adapter.factors for adapter in plan.adapters.values()}
    factors = {key: _factor_facts(found) for key, found in different.items()}
    return {
        "base": {"url": plan.base.url, "bytes": plan.base.n_bytes, "tensors": len(plan.base.tensors)},
        "names": {name: adapter.names for name, adapter in plan.adapters.items()},
        "renamed": {name: dict(sorted(found.items())) for name, found in plan.renamed.items()},
        "base_numerics": "dequantised" if plan.base.quantised else "as stored",
        "untied": dict(plan.base.untied),
        "adapters": {
            name: _adapter_facts(adapter, factors[id(adapter.factors)])
            for name, adapter in plan.adapters.items()
        },
        "sites": [
            {"site": s.name, "tensor": s.tensor, "shape": list(s.shape), "layout": s.layout}
            for s in plan.sites.values()
        ],
        "merges": [
            {
                "name": merge.name,
                "method": merge.method,
                "adapters": list(merge.adapters),
                "parameters": dict(merge.parameters),
                "export": merge.export,
                "heads": merge.heads,
            }
            for merge in plan.merges
        ],
        "shards": [{"name": shard.name, "bytes": shard.n_bytes} for shard in plan.shards],
        "units": plan.n_units,
        "passes": len(plan.groups),
        "read_bytes": plan.read_bytes + plan.adapter_bytes,
        "write_bytes": plan.write_bytes,
        "peak_bytes_per_worker": plan.peak_bytes,
        "moments": [asdict(one) for one in plan.moments],
        "estimate": asdict(estimate(plan, cluster or Cluster())),
        "warnings": list(plan.warnings),
    }


def _adapter_facts(adapter: Adapter, factors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "url": adapter.url,
        "bytes": adapter.file_bytes,
        "sites": len(adapter.factors),
        **factors,
        "biases": sorted(adapter.modules[site] for site in factors["biases"]),
        "heads": [head.name for head in adapter.heads],
        "replaced": sorted(adapter.replaced),
        "tokens": {tensor: list(rows.indices) for tensor, rows in sorted(adapter.tokens.items())},
        "ignored": dict(sorted(adapter.ignored.items())),
    }


def _factor_facts(factors: Mapping[str, Update]) -> dict[str, Any]:
    """What a person asks of an adapter's updates; `biases` are the sites saved as they are."""
    biases: list[str] = []
    if isinstance(factors, RankedFactors):
        ranks, scales, dora = {factors.rank}, {factors.scale}, False
    else:
        biases = [site for site, one in factors.items() if isinstance(one, SavedEntry)]
        products = [one for one in factors.values() if isinstance(one, FactorEntry)]
        ranks = {one.rank for one in factors.values()}
        scales = {product.scale for one in products for product in one.products}
        dora = any(one.magnitude is not None for one in products)
    return {
        "ranks": sorted(ranks),
        "scales": sorted({round(scale, 6) for scale in scales if scale > 0}),
        "dora": dora,
        "biases": biases,
    }


def plan_table(plan: Plan, cluster: Cluster | None = None) -> None:
    """Print a plan for a person, with what it would take on `cluster`."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(highlight=False, soft_wrap=True, markup=False, width=width)
    facts = plan_json(plan, cluster)
    console.print(
        f"base      {plan.base.url}: {len(plan.base.tensors)} tensors, {human_bytes(plan.base.n_bytes)}"
    )
    for line in _names_lines(plan):
        console.print(f"names     {line}")
    if plan.base.quantised:
        console.print(
            f"numerics  {len(plan.base.quantised)} quantised weights are dequantised; the result is not quantised"
        )
    for name, twin in plan.base.untied.items():
        console.print(f"untied    {name} gets values of its own, beginning from {twin}")
    adapters = Table("adapter", "sites", "ranks", "scales", "saved", "size", box=None, pad_edge=False)
    for name, row in facts["adapters"].items():
        cells = [
            _span(row["ranks"]) + (" DoRA" if row["dora"] else ""),
            _span(row["scales"]),
            _saved_words(row),
        ]
        adapters.add_row(name, str(row["sites"]), *cells, human_bytes(row["bytes"]))
    console.print(adapters)
    merges = Table("merge", "method", "adapters", "parameters", "export", box=None, pad_edge=False)
    for merge in plan.merges:
        shown = ", ".join(f"{key}={_short(value)}" for key, value in merge.parameters.items())
        export = merge.export if merge.heads is None else f"{merge.export}, head of {merge.heads}"
        merges.add_row(merge.name, merge.method, _few(merge.adapters, " "), shown, export)
    console.print(merges)
    console.print(
        f"read      {human_bytes(facts['read_bytes'])}: the base {facts['passes']} time(s), adapters "
        f"{human_bytes(plan.adapter_bytes)}"
    )
    console.print(
        f"write     {human_bytes(facts['write_bytes'])}: {len(plan.shards)} shard(s) a checkpoint, "
        f"{facts['units']} unit(s) in all"
    )
    console.print(f"memory    about {human_bytes(plan.peak_bytes)} per worker")
    for one in plan.moments:
        console.print(
            f"moments   {one.kind} of {one.tasks} task(s) through {one.class_name} in {one.stages} stage(s): at most "
            f"{one.tasks * one.parts} object(s), about {human_bytes(one.peak_bytes)} a stage"
        )
    for line in _estimate_lines(facts["estimate"]):
        console.print(line)
    for warning in plan.warnings:
        console.print(f"warning   {warning}")


def _names_lines(plan: Plan) -> list[str]:
    """How runtime names became disk names: the rule of each adapter, and the first few that differ."""
    lines = [f"{len(plan.sites)} sites"]
    for rule in dict.fromkeys(adapter.names for adapter in plan.adapters.values()):
        of = [name for name, adapter in plan.adapters.items() if adapter.names == rule]
        lines.append(f"{_few(of, ', ')}: {rule}")
    table = {name: tensors for found in plan.renamed.values() for name, tensors in found.items()}
    for name, tensors in list(table.items())[:MAX_NAMES_SHOWN]:
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        lines.append(f"  {name} -> {tensors[0]}{more}")
    if len(table) > MAX_NAMES_SHOWN:
        lines.append(f"  ... {len(table) - MAX_NAMES_SHOWN} more (--json lists all)")
    return lines


def _few(names: Sequence[str], between: str) -> str:
    """Names, or the first and last of many."""
    if len(names) <= MAX_ADAPTERS_SHOWN:
        return between.join(names)
    return f"{between.join(names[:3])} ... {names[-1]} ({len(names)})"


def _estimate_lines(facts: Mapping[str, Any]) -> list[str]:
    given = facts["cluster"]
    rates = [f"{word} {human_bytes(given[f'{word}_bytes_per_second'])}/s" for word in ("read", "write")]
    gflops = given["flops_per_second"] / 1e9
    cluster = f"{given['workers']} worker(s), each {', '.join(rates)}, {gflops:g} GFLOP/s"
    parts = [f"{word} {_duration(facts[f'{word}_hours'])}" for word in ("read", "arithmetic", "write")]
    return [
        f"estimate  about {_duration(facts['hours'])}, most of it {facts['bound_by']} ({', '.join(parts)}): {cluster}",
        f"          {human_bytes(facts['read_bytes'])} read, each worker's copy of the adapters included; "
        f"{human_bytes(facts['write_bytes'])} written; {facts['flops']:.2g} FLOP; "
        f"{human_bytes(facts['cluster_memory_bytes'])} of memory in all",
    ]


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.2g} h" if hours < 100 else f"{hours:.0f} h"
    return f"{hours * 60:.2g} min" if hours * 60 >= 1 else f"{hours * 3600:.2g} s"


def _saved_words(row: Mapping[str, Any]) -> str:
    words = [*row["heads"], *(f"{name} replaced" for name in row["replaced"])]
    words += [f"{len(rows)} token(s) of {tensor}" for tensor, rows in row["tokens"].items()]
    words += [f"{len(row['biases'])} bias(es)"] if row["biases"] else []
    words += [f"{len(row['ignored'])} ignored"] if row["ignored"] else []
    return ", ".join(words) or "-"


def _span(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        distinct = list(dict.fromkeys(value.values()))
        return str(distinct[0]) if len(distinct) == 1 else json.dumps(value)
    if has_gradient(value):
        return " ".join(_level(item) for item in value)
    return json.dumps(value) if isinstance(value, list) else str(value)


def _level(item: Mapping[str, Any]) -> str:
    """One item of a value that changes with depth."""
    words = [str(item["filter"])] if "filter" in item else []
    words += [f"depth {item['depth']:g}"] if "depth" in item else []
    return " ".join([*words, _short(item["value"])])


def run_result(result: RunResult, *, as_json: bool) -> None:
    """Print what a run did."""
    from ray_merge.drive.result import summary

    if as_json:
        print(json.dumps(summary(result), indent=1))
        return
    for merge in result.merges:
        state = "published" if merge.done else "complete already"
        print(f"{merge.name}: {state}, id {merge.id[:12]}, {merge.url}")
    if not any(merge.done for merge in result.merges):
        print(f"nothing to do: all {len(result.merges)} merge(s) are complete")
    for warning in result.warnings:
        logs.say(f"warning: {warning}", level=logging.WARNING, json_text=warning)


def verified(results: Sequence[Verified], *, as_json: bool) -> None:
    """Print what verification found."""
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=1))
        return
    for result in results:
        probed = f"{result.probed} site(s) probed, worst {result.worst:.2f} of what rounding allows"
        print(
            f"{result.name}: {result.files} files, {human_bytes(result.n_bytes)}, hashes match; "
            + (probed if result.probed else f"not probed{': ' if result.unprobed else ''}{result.unprobed}")
        )


def methods_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the registry of methods."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(highlight=False, markup=False, width=width)
    table = Table("method", "what it does", "spaces", "parameters", "reference", box=None, pad_edge=False)
    for row in rows:
        parameters = ", ".join(
            key if item["required"] else f"{key}={item['default']}" for key, item in row["parameters"].items()
        )
        table.add_row(row["name"], row["summary"], " ".join(row["spaces"]), parameters, row["reference"])
    console.print(table)
