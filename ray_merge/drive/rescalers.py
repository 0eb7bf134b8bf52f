"""emr/rescalers.json: what each adapter's part of the unified update is multiplied with, from the receipts of shards.

Sums travel in receipts, and are added up here in the order of shards and sites, exactly rounded: the order in which
units ended does not show.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ray_merge.methods.catalogue.emr import rescaler
from ray_merge.plan import Plan
from ray_merge.plan.emr import EmrSite, emr_object, emr_sites
from ray_merge.spec import Merge, Receipt
from ray_merge.storage.commit import pretty_json


def rescalers_json(plan: Plan, merge: Merge, receipts: Mapping[str, Receipt]) -> bytes:
    """The content of emr/rescalers.json.

    Args:
        plan: of the run.
        merge: an emr merge.
        receipts: of its objects, by name.
    """
    own: dict[str, dict[str, float]] = defaultdict(dict)
    masked: dict[str, dict[str, float]] = defaultdict(dict)
    for index, sites in sorted(emr_sites(plan, merge).items()):
        sums = receipts[emr_object(plan.shards[index])].sums
        for item in sites:
            share = _share(merge, item)
            for name, (whole, kept) in zip(item.adapters, sums[item.site.name], strict=True):
                own[name][item.site.name] = whole * share
                masked[name][item.site.name] = kept * share
    rescalers: dict[str, Any] = {
        name: {site: rescaler(own[name][site], masked[name][site]) for site in own[name]}
        if merge.parameters["scope"] == "tensor"
        else rescaler(math.fsum(own[name].values()), math.fsum(masked[name].values()))
        for name in merge.adapters
    }
    return pretty_json({"scope": merge.parameters["scope"], "rescalers": rescalers})


def _share(merge: Merge, item: EmrSite) -> float:
    """What a site's sums count: the authors add up means of weights."""
    return 1.0 / math.prod(item.tensor_shape) if merge.parameters["compat"] == "authors" else 1.0
