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
from ray_merge.methods.catalogue import (
    breadcrumbs,
    cart,
    dare,
    della,
    emr,
    fisher,
    free,
    isotropic,
    learned,
    lego,
    pcb,
    prune,
    regmean,
    robust,
    sums,
    tall,
    ties,
    tsv,
    wudi,
)
from ray_merge.methods.declare import Method
from ray_merge.methods.memory import SiteBytes
from ray_merge.methods.resolve import at_site, resolve_parameters

METHODS: tuple[Method, ...] = (
    *sums.METHODS,
    *ties.METHODS,
    *dare.METHODS,
    *tsv.METHODS,
    *isotropic.METHODS,
    *cart.METHODS,
    *lego.METHODS,
    *robust.METHODS,
    *free.METHODS,
    *wudi.METHODS,
    *prune.METHODS,
    *breadcrumbs.METHODS,
    *della.METHODS,
    *tall.METHODS,
    *pcb.METHODS,
    *emr.METHODS,
    *regmean.METHODS,
    *fisher.METHODS,
    *learned.METHODS,
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
    "selects_over_model",
    "statistics_kind",
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
    if method.factors_only or method.adds_factors(parameters):
        return False
    return bool(parameters.get("space", method.spaces[0]) == "dense")


def selects_over_model(method: Method, parameters: Mapping[str, Any]) -> bool:
    """Whether `method`, with resolved `parameters`, needs thresholds over all sites before it can merge one."""
    return method.counts is not None and parameters.get("scope") == "model"


def statistics_kind(method: Method, parameters: Mapping[str, Any]) -> str:
    """Which statistics a merge needs: "", "gram", or "fisher/" and whose labels."""
    labels = f"/{parameters['labels']}" if method.statistics == "fisher" else ""
    return method.statistics + labels


def working_bytes(
    method: Method, space: str | None, shape: tuple[int, int], ranks: Sequence[int]
) -> SiteBytes:
    """Bytes of one merge by `method` at one site of `shape`, in `space` (default: its own default space)."""
    return method.sizes(space or method.spaces[0], shape, ranks)


def describe(method: Method) -> dict[str, Any]:
    """The declaration as JSON-able data, for `ray-merge methods`."""
    return {
        "name": method.name,
        "aliases": list(method.aliases),
        "family": method.family,
        "summary": method.summary,
        "reference": method.reference,
        "needs": list(method.needs),
        "statistics": method.statistics,
        "learned": method.learned,
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
