"""What `inspect` prints: one table of adapters, one of pairs, and the sentences that belong to them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ray_merge.inspect import InspectedAdapter, InspectedPair, Inspection

SIGNIFICANT_DIGITS = 9
"""In JSON: what another BLAS, or another order of summation, does not change."""

MAX_NAMES_SHOWN = 4

PIPE_WIDTH = 160
"""A pipe has no width of its own; 80 would break the rows."""

LEGEND = (
    "norm, largest: Frobenius norm over all modules, largest singular value of any. effective rank: mean over modules "
    "of exp(entropy of the singular values), and as a share of the rank.",
    "outputs, inputs: overlap of what two updates write to (lora_B) and read from (lora_A): mean squared cosine of the "
    "principal angles, 1 = the same subspace; in brackets what a random subspace would give.",
    "x on y: interference |dx P| / |dy|, P the projection on the inputs that y reads: how much x adds there, y's own "
    "update being 1. No data is used: all those inputs count alike, so it bounds nothing and predicts no score.",
)


def inspection_json(inspection: Inspection) -> dict[str, Any]:
    """An inspection as JSON-able data: the same adapters give the same text."""
    document: dict[str, Any] = _rounded(asdict(inspection))
    return {**document, "refused": list(inspection.refused)}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def inspection_table(inspection: Inspection) -> None:
    """Print an inspection for a person."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(highlight=False, soft_wrap=True, markup=False, width=width)
    if inspection.base is not None:
        console.print(f"base      {inspection.base}")
    console.print(_adapters(inspection.adapters))
    for adapter in inspection.adapters:
        _details(console, adapter)
    if inspection.pairs:
        console.print()
        console.print(_pairs(inspection.pairs))
    for warning in inspection.warnings:
        console.print(f"warning   {warning}")
    for sentence in LEGEND if inspection.pairs else LEGEND[:1]:
        console.print(f"          {sentence}")


def _adapters(adapters: Sequence[InspectedAdapter]) -> Table:
    heads = ("adapter", "modules", "ranks", "alphas", "scales", "norm", "largest", "effective rank", "")
    table = Table(*heads, box=None, pad_edge=False)
    for adapter in adapters:
        effective = _number(adapter.effective_rank)
        if adapter.rank_used is not None:
            effective += f" ({100 * adapter.rank_used:.0f} %)"
        table.add_row(
            adapter.name,
            str(adapter.modules),
            _span(adapter.ranks),
            _span(adapter.alphas),
            _span(adapter.scales),
            _number(adapter.norm),
            _number(adapter.spectral_norm),
            effective,
            "refused" if adapter.refusal else "",
        )
    return table


def _details(console: Console, adapter: InspectedAdapter) -> None:
    version = f"PEFT {adapter.peft_version}" if adapter.peft_version else "PEFT of unknown version"
    base = f"base {adapter.base}" if adapter.base else "names no base"
    facts = [version, *([adapter.task_type] if adapter.task_type else []), base, *adapter.variants]
    console.print(f"{adapter.name}: {', '.join(facts)}")
    if adapter.layouts:
        console.print(f"  sites     {', '.join(f'{n} {layout}' for layout, n in adapter.layouts.items())}")
    if adapter.names:
        console.print(f"  names     {adapter.names}")
    if adapter.saved:
        console.print(f"  saved     {_first(adapter.saved)}")
    if adapter.tokens:
        console.print(f"  tokens    {', '.join(f'{n} of {name}' for name, n in adapter.tokens.items())}")
    if adapter.ignored:
        console.print(f"  ignored   {_first([f'{name} ({why})' for name, why in adapter.ignored.items()])}")
    for note in adapter.notes:
        console.print(f"  note      {note}")
    for warning in adapter.warnings:
        console.print(f"  warning   {warning}")
    if adapter.refusal:
        console.print(f"  refused   {adapter.refusal}")


def _pairs(pairs: Sequence[InspectedPair]) -> Table:
    heads = (
        "first", "second", "shared", "outputs", "inputs", "cosine", "second on first", "first on second"
    )  # fmt: skip
    table = Table(*heads, box=None, pad_edge=False)
    for pair in pairs:
        total = pair.total
        table.add_row(
            pair.first,
            pair.second,
            str(len(pair.sites)),
            f"{_number(total.outputs)} ({_number(total.outputs_by_chance)})",
            f"{_number(total.inputs)} ({_number(total.inputs_by_chance)})",
            _number(total.cosine),
            _number(total.on_first),
            _number(total.on_second),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _span(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _first(words: Sequence[str]) -> str:
    more = f", {len(words) - MAX_NAMES_SHOWN} more (--json lists all)" if len(words) > MAX_NAMES_SHOWN else ""
    return ", ".join(words[:MAX_NAMES_SHOWN]) + more
