"""Every merge method, as an explicit list; torch-free.

Owns: names and what each method declares. Kernels are named as text and imported by `kernels.py` on the
machine that merges.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ray_merge.errors import MethodError
from ray_merge.methods import parameters as p
from ray_merge.methods import rules
from ray_merge.methods.declare import Method
from ray_merge.methods.memory import working_bytes
from ray_merge.methods.resolve import at_site, resolve_parameters

SUMS = "ray_merge.methods.sums"
TIES = "ray_merge.methods.ties"
DARE = "ray_merge.methods.dare"
TIES_PAPER = "TIES-Merging, arXiv 2306.01708"
DARE_PAPER = "DARE, arXiv 2311.03099"
KNOTS_PAPER = "KnOTS, arXiv 2410.19735"

METHODS: tuple[Method, ...] = (
    Method(
        name="task_arithmetic",
        family="sum",
        summary="lambda * sum_i weight_i * delta_i",
        reference="Task Arithmetic, arXiv 2212.04089",
        low_rank_spaces=("dense",),
        parameters=p.Sum,
        rule=rules.divided_sum,
        kernel=f"{SUMS}:task_arithmetic",
    ),
    Method(
        name="linear",
        family="sum",
        summary="lambda * sum_i weight_i * delta_i / sum_i weight_i",
        reference="model soups, arXiv 2203.05482; compat peft: add_weighted_adapter(linear)",
        low_rank_spaces=("dense",),
        parameters=p.Linear,
        rule=rules.linear,
        kernel=f"{SUMS}:linear",
    ),
    Method(
        name="cat",
        factors_only=True,
        family="sum",
        summary="the exact weighted sum as concatenated factors",
        reference="PEFT add_weighted_adapter(cat)",
        low_rank_spaces=("dense",),
        parameters=p.Concatenate,
        kernel=f"{SUMS}:cat",
    ),
    Method(
        name="svd",
        factors_only=True,
        family="sum",
        summary="the weighted sum truncated to `rank`, with the relative error reported",
        reference="PEFT add_weighted_adapter(svd)",
        low_rank_spaces=("dense",),
        parameters=p.Truncate,
        kernel=f"{SUMS}:svd",
    ),
    Method(
        name="ties",
        family="ties",
        summary="trim each delta, elect a sign per entry, average the entries that agree",
        reference=TIES_PAPER,
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=p.Ties,
        rule=rules.ties,
        kernel=f"{TIES}:ties",
    ),
    Method(
        name="dare_linear",
        family="dare",
        summary="drop entries at random, rescale the rest, sum",
        reference=DARE_PAPER,
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=p.DareLinear,
        rule=rules.dare_linear,
        kernel=f"{DARE}:dare_linear",
    ),
    Method(
        name="dare_ties",
        family="dare",
        summary="drop entries at random, rescale the rest, elect a sign per entry, average what agrees",
        reference=f"{DARE_PAPER}; {TIES_PAPER}",
        spaces=("dense", "core", "knots"),
        low_rank_spaces=("core", "knots"),
        parameters=p.DareTies,
        rule=rules.dare_ties,
        kernel=f"{DARE}:dare_ties",
    ),
    Method(
        name="knots_ties",
        family="ties",
        summary="ties on the coordinates S V_i of [delta_1 .. delta_T] = U S [V_1 .. V_T]",
        reference=KNOTS_PAPER,
        spaces=("knots",),
        low_rank_spaces=("knots",),
        parameters=p.KnotsTies,
        rule=rules.knots_ties,
        kernel=f"{TIES}:knots_ties",
    ),
    Method(
        name="knots_dare_ties",
        family="dare",
        summary="dare_ties on the coordinates S V_i of [delta_1 .. delta_T] = U S [V_1 .. V_T]",
        reference=f"{KNOTS_PAPER}; {DARE_PAPER}",
        spaces=("knots",),
        low_rank_spaces=("knots",),
        parameters=p.KnotsDareTies,
        rule=rules.authors_weights,
        kernel=f"{DARE}:knots_dare_ties",
    ),
)


def by_name(methods: Sequence[Method]) -> Mapping[str, Method]:
    """Names and aliases to methods.

    Raises:
        ValueError: a name is taken twice.
    """
    table: dict[str, Method] = {}
    for method in methods:
        for name in (method.name, *method.aliases):
            if name in table:
                raise ValueError(
                    f"two merge methods are called {name!r}: {table[name].name} and {method.name}"
                )
            table[name] = method
    return MappingProxyType(table)


_BY_NAME = by_name(METHODS)

__all__ = [
    "METHODS",
    "at_site",
    "by_name",
    "describe",
    "get",
    "gives_factors",
    "resolve_parameters",
    "takes_dense",
    "working_bytes",
]


def get(name: str) -> Method:
    """The method called `name`.

    Raises:
        MethodError: unknown; the nearest names and all known ones are listed.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = difflib.get_close_matches(str(name), _BY_NAME, n=3)
    hint = f"; did you mean {' or '.join(repr(other) for other in near)}?" if near else "."
    raise MethodError(f"unknown merge method {name!r}{hint} Known: {', '.join(sorted(_BY_NAME))}")


def gives_factors(method: Method, space: str | None = None) -> bool:
    """Whether the result of `method` has factors in `space` (default: its own default space)."""
    return (space or method.spaces[0]) in method.low_rank_spaces


def takes_dense(method: Method, parameters: Mapping[str, Any]) -> bool:
    """Whether `method`, with resolved `parameters`, can take a delta that has no factors (DoRA)."""
    if method.factors_only or (method.family == "sum" and parameters.get("compat") == "peft"):
        return False
    return bool(parameters.get("space", method.spaces[0]) == "dense")


def describe(method: Method) -> dict[str, Any]:
    """The declaration as JSON-able data, for `ray-merge methods`."""
    return {
        "name": method.name,
        "aliases": list(method.aliases),
        "family": method.family,
        "summary": method.summary,
        "reference": method.reference,
        "needs": list(method.needs),
        "spaces": list(method.spaces),
        "low_rank_spaces": list(method.low_rank_spaces),
        "parameters": {
            key: {
                "kind": item.kind,
                "help": item.help,
                "default": item.default,
                "required": item.required,
                "range": str(item.interval) if item.kind in ("number", "integer") else None,
                "choices": list(item.choices),
                "per_adapter": item.per_adapter,
                "per_site": item.per_site,
            }
            for key, item in method.declared().items()
        },
    }
