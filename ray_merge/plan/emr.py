"""What an EMR merge writes beside its checkpoint: one file for each shard that it touches, and the rescalers.

Owns the format, which `work/emr.py` writes and `ray_merge.load_emr` reads. Torch-free; shapes follow from headers.

    emr/model-0000i-of-0000N.safetensors   for each site, under its name
        .unified   (P, Q)                  coordinates of tau_u: the update itself in dense space
        .left      (O, P), .right (Q, I)   core and knots space: the update is left @ coordinates @ right
        .masks     (P, T, ceil(Q / 8))     uint8, of the T adapters that touch the site (algebra/bits.py)
        metadata "emr": site -> tensor, its shape, first row, shape of the site, adapters in order
    emr/rescalers.json                     adapter -> rescaler, or site -> rescaler with `scope: tensor`

Dense coordinates are stored like the weight that they belong to: rounding to bfloat16 costs at most 0.4 % of an
entry, the weight that they are added to is rounded far coarser than that, and float32 would double the files.
Coordinates and sides of the other spaces are thin and stay float32 (float64 beside a float64 weight).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_merge.errors import RecipeError
from ray_merge.methods.catalogue.emr import NAME
from ray_merge.plan.layout import SHARD_METADATA, Shard
from ray_merge.spec import DTYPE_BYTES, Adapter, Merge, Site
from ray_merge.storage.headers import make_header

if TYPE_CHECKING:
    from ray_merge.plan.plan import Plan

FOLDER = "emr"
RESCALERS = f"{FOLDER}/rescalers.json"
METADATA_KEY = "emr"
UNIFIED, MASKS, LEFT, RIGHT = "unified", "masks", "left", "right"

Layout = list[tuple[str, str, tuple[int, ...]]]
"""(name, dtype, shape) of tensors in file order."""


@dataclass(frozen=True, slots=True)
class EmrSite:
    """What a file holds of one site.

    Args:
        site: which.
        adapters: those that touch it, in recipe order.
        dtype: of coordinates and sides.
        coordinates: their (P, Q).
        sides: shape of each side by its word.
        tensor_shape: of the weight as it is stored.
    """

    site: Site
    adapters: tuple[str, ...]
    dtype: str
    coordinates: tuple[int, int]
    sides: Mapping[str, tuple[int, int]]
    tensor_shape: tuple[int, ...]

    @property
    def values(self) -> Layout:
        """Sides and coordinates."""
        shapes = {**self.sides, UNIFIED: self.coordinates}
        return [(f"{self.site.name}.{word}", self.dtype, shape) for word, shape in shapes.items()]

    @property
    def masks(self) -> tuple[str, str, tuple[int, ...]]:
        """The masks of all adapters."""
        P, Q = self.coordinates
        return f"{self.site.name}.{MASKS}", "U8", (P, len(self.adapters), -(-Q // 8))


def is_emr(merge: Merge) -> bool:
    """Whether a merge gives its adapters back."""
    return merge.method == NAME


def emr_object(shard: Shard) -> str:
    """Name of the object beside a shard."""
    return f"{FOLDER}/{shard.name}"


def emr_sites(plan: Plan, merge: Merge) -> dict[int, list[EmrSite]]:
    """The sites of a merge by the index of the shard that their weights lie in; empty for other methods."""
    found: dict[int, list[EmrSite]] = {}
    if not is_emr(merge):
        return found
    by_tensor: dict[str, list[Site]] = {}
    for site in plan.touched(merge):
        by_tensor.setdefault(site.tensor, []).append(site)
    for shard in plan.shards:
        # A shard has its widest dtypes first, so that every tensor of the file is aligned to its own.
        for tensor in shard.tensors:
            for site in by_tensor.get(tensor.name, ()):
                found.setdefault(shard.index, []).append(
                    _described(plan, merge, site, tensor.dtype, tensor.shape)
                )
    return found


def _described(plan: Plan, merge: Merge, site: Site, stored: str, tensor_shape: tuple[int, ...]) -> EmrSite:
    ranks = {
        name: plan.adapters[name].factors[site.name].rank
        for name in merge.adapters
        if site.name in plan.adapters[name].factors
    }
    space, (rows, columns) = merge.parameters["space"], site.shape
    touching = tuple(ranks)
    if space == "dense":
        return EmrSite(site, touching, stored, site.shape, {}, tensor_shape)
    dtype = "F64" if stored == "F64" else "F32"
    if space == "core":
        P, Q = (min(size, sum(ranks.values())) for size in site.shape)
        return EmrSite(site, touching, dtype, (P, Q), {LEFT: (rows, P), RIGHT: (Q, columns)}, tensor_shape)
    # The basis leaves out small directions, which a header cannot know: the file is padded with zeros instead.
    P = min(rows, sum(min(columns, rank) for rank in ranks.values()))
    return EmrSite(site, touching, dtype, (P, columns), {LEFT: (rows, P)}, tensor_shape)


def emr_layout(sites: Sequence[EmrSite]) -> Layout:
    """The tensors of one file: all values, then all masks, which need no alignment."""
    return [tensor for site in sites for tensor in site.values] + [site.masks for site in sites]


def emr_metadata(sites: Sequence[EmrSite]) -> dict[str, str]:
    """The metadata of one file."""
    described = {
        item.site.name: {
            "tensor": item.site.tensor,
            "tensor_shape": list(item.tensor_shape),
            "start": item.site.start,
            "shape": list(item.site.shape),
            "adapters": list(item.adapters),
        }
        for item in sites
    }
    return {**SHARD_METADATA, METADATA_KEY: json.dumps(described, separators=(",", ":"))}


def emr_bytes(plan: Plan, merge: Merge) -> dict[int, int]:
    """Length of every file of a merge, by the index of the shard that it lies beside."""
    return {index: _file_bytes(sites) for index, sites in emr_sites(plan, merge).items()}


def _file_bytes(sites: Sequence[EmrSite]) -> int:
    layout = emr_layout(sites)
    header, _ = make_header(layout, emr_metadata(sites))
    return len(header) + sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in layout)


def check_emr(merge: Merge, adapters: Mapping[str, Adapter]) -> None:
    """Refuse what a mask and a rescaler cannot give back: parameters and rows that an adapter sets as a whole.

    Raises:
        RecipeError: which, and the way out.
    """
    if not is_emr(merge):
        return
    for name in merge.adapters:
        tensor = next(iter((*adapters[name].replaced, *adapters[name].tokens)), None)
        if tensor is not None:
            raise RecipeError(
                f"merge {merge.name!r}: emr gives every adapter back as an update of the base, but adapter {name} "
                f"saved its own {tensor}, whole or some rows of it; use another method, or train that adapter on "
                "low-rank updates alone"
            )
