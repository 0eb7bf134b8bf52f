"""How deep in its model every site lies, for values that change with depth."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ray_merge.errors import RecipeError
from ray_merge.methods.gradient import has_gradient, run_of
from ray_merge.models.blocks import block_prefixes
from ray_merge.spec import Merge, Site

_BLOCK = re.compile(r"(.*?\.)?([0-9]+)\.")
"""The first number of a name is the place in its outermost list (models/blocks.py)."""


def with_depths(sites: Mapping[str, Site], tensors: Collection[str]) -> dict[str, Site]:
    """The sites with their depths: block / (blocks - 1) in the list of blocks that holds their tensor.

    As for mergekit, the one block of a list lies at depth 1, and what belongs to no block at depth 0. An encoder, a
    decoder and a vision tower count for themselves.

    Args:
        sites: by name.
        tensors: disk names of all tensors of the base.
    """
    prefixes = set(block_prefixes(sorted(tensors)))
    if not prefixes:
        return dict(sites)
    counts = dict.fromkeys(prefixes, 0)
    for name in tensors:
        match = _BLOCK.match(name)
        if match and (match[1] or "") in prefixes:
            counts[match[1] or ""] = max(counts[match[1] or ""], int(match[2]) + 1)
    return {name: replace(site, depth=_depth(site.tensor, counts)) for name, site in sites.items()}


def _depth(tensor: str, counts: Mapping[str, int]) -> float:
    match = _BLOCK.match(tensor)
    count = counts.get(match[1] or "", 0) if match else 0
    if match is None or not count:
        return 0.0
    return int(match[2]) / (count - 1) if count > 1 else 1.0


def check_gradients(merge: Merge, sites: Mapping[str, Site], base: str) -> list[str]:
    """Refuse values that change with depth where there is none, and warn of lists that may be meant otherwise.

    Raises:
        RecipeError: the base has no blocks.
    """
    changing = [key for key, value in merge.parameters.items() if has_gradient(value)]
    if changing and any(site.depth is None for site in sites.values()):
        raise RecipeError(
            f"merge {merge.name!r}: {changing[0]} changes with depth, but the tensors of {base} are in no list of "
            "blocks (model.layers.0., model.layers.1. ...); give one value, or values by filter"
        )
    return [
        f"merge {merge.name!r}: {key} is a gradient of {len(merge.adapters)} values from the first block to the last, "
        "and the merge has as many adapters; one value per adapter is written as a mapping by adapter"
        for key in changing
        if _may_mean_adapters(merge.parameters[key], merge.adapters)
    ]


def _may_mean_adapters(items: Sequence[Mapping[str, object]], adapters: Sequence[str]) -> bool:
    knots = run_of(items, 0)
    alike = all(isinstance(value, Mapping) and len(set(value.values())) == 1 for _, value in knots)
    return len(knots) == len(items) == len(adapters) and len(adapters) > 1 and alike
