"""From a method's name to its result at one site: what a worker calls.

Owns: importing kernels. Never checks parameters (`resolve.py` did, before anything was read).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.context import Context, Thresholds
from ray_merge.methods.registry import get

Kernel = Callable[[SiteFactors, Any, Context], Delta]


@cache
def load(kernel: str) -> Kernel:
    """The function named by "module:function"."""
    module, _, name = kernel.partition(":")
    function: Kernel = getattr(importlib.import_module(module), name)
    return function


def merge_site(
    method: str,
    factors: SiteFactors,
    parameters: Any,
    *,
    names: Sequence[str],
    site: str,
    seed: int,
    inputs: Mapping[str, Any] | None = None,
    thresholds: Thresholds | None = None,
) -> Delta:
    """Merge the adapters of one site.

    Args:
        method: name or alias.
        factors: the site's factors in adapter order; shared decompositions are cached on it.
        parameters: what `at_site` returned for this site.
        names: adapter names in the same order.
        site: runtime site name.
        seed: the merge's seed.
        inputs: moments, phi or base, for methods that need them.
        thresholds: with `scope: model`, what was selected over all sites.

    Returns:
        The merged update; rows are float32, or float64 where the factors were float64.

    Raises:
        MethodError: unknown method, or factors that the method cannot take.
    """
    context = Context(names=tuple(names), site=site, seed=seed, inputs=inputs or {}, thresholds=thresholds)
    return load(get(method).kernel)(factors, parameters, context)
