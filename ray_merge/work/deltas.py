"""The update of one site in each of several merges: factors, parameters and what was learned or measured -> kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.context import Thresholds
from ray_merge.methods.kernels import Made, merge_site
from ray_merge.methods.registry import get
from ray_merge.methods.resolve import at_site
from ray_merge.spec import Merge, Site
from ray_merge.work.factors import AdapterFiles, Base


def site_deltas(
    site: Site,
    merges: Sequence[Merge],
    files: AdapterFiles,
    base: Base,
    thresholds: Mapping[str, Thresholds],
) -> list[Delta]:
    """The update of one site in each merge; merges of the same adapters share factors and bases.

    Args:
        site: which.
        merges: all begin from the same base weight.
        files: of the adapters.
        base: gives that base weight where an update depends on it.
        thresholds: by name of merge, of those that select over the whole model.
    """
    shared: dict[tuple[str, ...], SiteFactors] = {}
    made: Made = {}
    deltas = []
    for merge in merges:
        if merge.adapters not in shared:
            shared[merge.adapters] = files.site(merge.adapters, site, base)
        method = get(merge.method)
        parameters = at_site(method, merge.parameters, merge.adapters, site.name, site.depth)
        deltas.append(
            merge_site(
                merge.method,
                shared[merge.adapters],
                parameters,
                names=merge.adapters,
                site=site.name,
                seed=merge.seed,
                inputs=_inputs(merge, site, files),
                thresholds=thresholds.get(merge.name),
                made=made,
            )
        )
    return deltas


def _inputs(merge: Merge, site: Site, files: AdapterFiles) -> dict[str, Any]:
    """What the kernel of a merge gets besides factors: moments or phi."""
    moments = files.statistics.inputs(get(merge.method), merge.parameters, merge.adapters, site)
    return {**(moments or {}), **files.learned.inputs(merge.name, site)}
