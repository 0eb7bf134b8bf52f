"""From a method's name to its result at one site: what a worker calls.

Owns: importing kernels. Never checks parameters (`resolve.py` did, before anything was read).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from functools import cache
from typing import Any

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.context import Context, Thresholds
from ray_merge.methods.registry import get

Kernel = Callable[[SiteFactors, Any, Context], Delta]

Made = MutableMapping[Hashable, Delta]
"""Method, adapters, parameters without lambda, seed and thresholds -> what the kernel gave at one site."""


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
    made: Made | None = None,
) -> Delta:
    """Merge the adapters of one site. The kernel leaves `lambda` out; it multiplies what the kernel gives.

    Args:
        method: name or alias.
        factors: the site's factors in adapter order; shared decompositions are cached on it.
        parameters: what `at_site` returned for this site.
        names: adapter names in the same order.
        site: runtime site name.
        seed: the merge's seed.
        inputs: moments, phi or base, for methods that need them.
        thresholds: with `scope: model`, what was selected over all sites.
        made: remembers what kernels gave at this site, for merges that differ in lambda alone.

    Returns:
        The merged update; rows are float32, or float64 where the factors were float64.

    Raises:
        MethodError: unknown method, or factors that the method cannot take.
    """
    lambda_ = getattr(parameters, "lambda_", 1.0)
    plain = dataclasses.replace(parameters, lambda_=1.0) if lambda_ != 1.0 else parameters
    context = Context(names=tuple(names), site=site, seed=seed, inputs=inputs or {}, thresholds=thresholds)
    kernel = load(get(method).kernel)
    if made is None:
        delta = kernel(factors, plain, context)
        return delta if lambda_ == 1.0 else delta.scaled(lambda_)
    bounds = None if thresholds is None else tuple(map(tuple, thresholds))
    key = (method, context.names, plain, seed, bounds)
    if key not in made:
        made[key] = kernel(factors, plain, context)
    return made[key].scaled(lambda_)
