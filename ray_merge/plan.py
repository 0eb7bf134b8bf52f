"""Recipe x headers -> what would be read, merged and written, and every refusal that headers can show.

Pure: reads no weights and writes nothing. `read_inputs` is the only part that touches a store (headers and
configs); `make_plan` is arithmetic on what it found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import RecipeError
from ray_merge.fit import check_bases, find_sites
from ray_merge.methods.memory import SiteBytes, working_bytes
from ray_merge.methods.registry import get, gives_factors
from ray_merge.models.blocks import cut_shards
from ray_merge.models.names import Naming
from ray_merge.recipe import Recipe
from ray_merge.spec import DTYPE_BYTES, FLOAT_DTYPES, Adapter, Merge, Site, TensorEntry
from ray_merge.storage.adapter import read_adapter
from ray_merge.storage.checkpoint import Checkpoint, read_checkpoint
from ray_merge.storage.headers import make_header
from ray_merge.storage.store import Stores

DEFAULT_MEMORY_BYTES = 640 * 10**6
"""Ceiling per worker; two workers and the driver then stay under 1.5 GB."""

RUNTIME_BYTES = 300 * 10**6
"""A Ray worker with torch and this package loaded (measured: 283 MB with torch 2.13 and Ray 2.60 on Linux)."""

STREAM_BYTES = 40 * 10**6
"""Chunks read ahead, and the float32 copies of the one being merged (storage/stream.py: 2 MiB as stored)."""

MAX_GROUP = 16
"""Merges that share one pass over the base. Each has one unfinished shard on the worker's disk meanwhile."""


ADAPTER_OBJECT = "adapter/adapter_model.safetensors"
"""Where a merge's exported adapter lies: the folder `adapter` loads with PeftModel.from_pretrained."""


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of an output shard: where it comes from and the dtype it is stored in."""

    source: TensorEntry
    dtype: str

    @property
    def n_bytes(self) -> int:
        """Bytes in the output."""
        return self.source.n_bytes // DTYPE_BYTES[self.source.dtype] * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """One planned output file; name, order and size are final before anything runs."""

    index: int
    name: str
    tensors: tuple[OutTensor, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a run needs to know, small enough to send to every worker.

    Args:
        recipe: the validated recipe.
        base: the base checkpoint's headers.
        adapters: by the recipe's names, only those that a merge uses.
        naming: how runtime names became disk names.
        sites: disk tensor name -> site.
        merges: in recipe order.
        shards: of every checkpoint that this recipe writes.
        groups: indices into `merges` that share one pass over the base, in order.
        peak_bytes: estimated resident bytes of one worker.
        warnings: what a person should know; none of it stops the run.
    """

    recipe: Recipe
    base: Checkpoint
    adapters: Mapping[str, Adapter]
    naming: Naming
    sites: Mapping[str, Site]
    merges: tuple[Merge, ...]
    shards: tuple[Shard, ...]
    groups: tuple[tuple[int, ...], ...]
    peak_bytes: int
    warnings: tuple[str, ...]

    def touched(self, merge: Merge) -> set[str]:
        """Disk names of the base weights that `merge` changes."""
        modules = {module for name in merge.adapters for module in self.adapters[name].factors}
        return {tensor for tensor, site in self.sites.items() if site.name in modules}

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all adapter files."""
        return sum(adapter.file_bytes for adapter in self.adapters.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the shards of one merged checkpoint."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def read_bytes(self) -> int:
        """Base bytes that a whole run reads: once per group."""
        return self.base.n_bytes * len(self.groups)

    @property
    def write_bytes(self) -> int:
        """Shard bytes that a whole run writes."""
        return self.checkpoint_bytes * sum(merge.export != "adapter" for merge in self.merges)


def read_inputs(recipe: Recipe, merges: Sequence[Merge]) -> tuple[Checkpoint, dict[str, Adapter]]:
    """Headers and configs of the base and of every adapter that a merge uses."""
    stores = Stores()
    base = read_checkpoint(stores.open(recipe.base_model))
    used = {name for merge in merges for name in merge.adapters}
    adapters = {}
    for name, source in recipe.adapters.items():
        if name in used:
            if source.path is None:
                raise RecipeError(f"adapter {name} has no path, which a merge needs")
            adapters[name] = read_adapter(name, stores.open(source.path))
    return base, adapters


def make_plan(
    recipe: Recipe,
    merges: Sequence[Merge],
    base: Checkpoint,
    adapters: Mapping[str, Adapter],
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Plan:
    """Check adapters against the base and lay out the output.

    Args:
        recipe: the validated recipe.
        merges: the merges to plan, expanded.
        base: headers of the base.
        adapters: headers of every adapter used.
        memory_bytes: ceiling per worker, for the size of groups.

    Raises:
        Refusal: an adapter that does not fit the base, a merge that cannot be exported as asked.
    """
    naming, sites = find_sites(base, adapters)
    warnings = check_bases(recipe, base, adapters)
    shards = _shards(recipe, base)
    for merge in merges:
        _check_export(merge, adapters)
        warnings += _filter_warnings(merge, sites)
    checkpoints = [index for index, merge in enumerate(merges) if merge.export != "adapter"]
    group_size, peak = _fit_group(merges, adapters, sites, memory_bytes)
    groups = [tuple(checkpoints[i : i + group_size]) for i in range(0, len(checkpoints), group_size)]
    if peak > memory_bytes:
        warnings.append(
            f"one worker needs about {peak / 1e6:.0f} MB, more than the ceiling of {memory_bytes / 1e6:.0f} MB"
        )
    return Plan(
        recipe=recipe,
        base=base,
        adapters=adapters,
        naming=naming,
        sites=sites,
        merges=tuple(merges),
        shards=shards,
        groups=tuple(groups),
        peak_bytes=peak,
        warnings=tuple(warnings),
    )


def _shards(recipe: Recipe, base: Checkpoint) -> tuple[Shard, ...]:
    out = FLOAT_DTYPES[recipe.out_dtype] if recipe.out_dtype else None
    shards = []
    cuts = cut_shards(list(base.tensors.values()), recipe.max_shard_size)
    for index, entries in enumerate(cuts):
        # Larger elements first keeps every tensor aligned to its dtype, which readers by memory map need.
        tensors = tuple(
            OutTensor(entry, out if out and entry.dtype in FLOAT_DTYPES.values() else entry.dtype)
            for entry in entries
        )
        tensors = tuple(sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype]))
        name = f"model-{index + 1:05d}-of-{len(cuts):05d}.safetensors"
        header, _ = make_header(shard_layout(tensors), SHARD_METADATA)
        shards.append(Shard(index, name, tensors, len(header) + sum(t.n_bytes for t in tensors)))
    return tuple(shards)


SHARD_METADATA = {"format": "pt"}
"""transformers refuses a safetensors file without it."""


def shard_layout(tensors: Sequence[OutTensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of each tensor, as the writer takes them."""
    return [(tensor.source.name, tensor.dtype, tensor.source.shape) for tensor in tensors]


def _check_export(merge: Merge, adapters: Mapping[str, Adapter]) -> None:
    if merge.export == "checkpoint":
        return
    method = get(merge.method)
    space = merge.parameters.get("space", method.spaces[0])
    if not gives_factors(method, space):
        options = " or ".join(f"space: {name}" for name in method.low_rank_spaces) or "another method"
        raise RecipeError(
            f"merge {merge.name!r}: {merge.method} in {space} space has no exact low-rank form, so it cannot be "
            f"exported as an adapter; use export: checkpoint, or {options}"
        )
    kinds: dict[Any, str] = {}
    for name in merge.adapters:
        kinds.setdefault(adapters[name].config.get("task_type"), name)
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise RecipeError(
            f"merge {merge.name!r}: adapter {first} has task_type {one}, adapter {second} {other}; adapters of "
            "different model classes have no common adapter; use export: checkpoint"
        )


def _filter_warnings(merge: Merge, sites: Mapping[str, Site]) -> list[str]:
    warnings = []
    for key, value in merge.parameters.items():
        for item in value if isinstance(value, list) else []:
            pattern = item.get("filter") if isinstance(item, dict) else None
            if pattern and not any(re.search(pattern, site.name) for site in sites.values()):
                warnings.append(f"merge {merge.name!r}: {key} filter {pattern!r} matches no site")
    return warnings


def _fit_group(
    merges: Sequence[Merge], adapters: Mapping[str, Adapter], sites: Mapping[str, Site], memory_bytes: int
) -> tuple[int, int]:
    """The largest number of merges that can share a pass, and the bytes that one worker then needs.

    Counted at the most expensive site of each kind: factors and bases once for each set of adapters, what each
    merge keeps, and the temporaries of one merge.
    """
    held, passing = 0, 0
    shared: dict[tuple[str, ...], int] = {}
    for merge in merges:
        worst = _site_bytes(merge, adapters, sites)
        held, passing = max(held, worst.held), max(passing, worst.passing)
        shared[merge.adapters] = max(shared.get(merge.adapters, 0), worst.shared)
    # A set of adapters is kept as long as one of its merges is in the group; at most one set per merge.
    sets = sorted(shared.values(), reverse=True)
    for size in range(min(MAX_GROUP, max(1, len(merges))), 0, -1):
        peak = RUNTIME_BYTES + STREAM_BYTES + passing + size * held + sum(sets[:size])
        if peak <= memory_bytes or size == 1:
            return size, peak
    raise AssertionError("unreachable: a group of one is always returned")


def _site_bytes(merge: Merge, adapters: Mapping[str, Adapter], sites: Mapping[str, Site]) -> SiteBytes:
    method, space = get(merge.method), merge.parameters.get("space")
    kinds = {
        (
            site.shape,
            tuple(
                adapters[n].factors[site.name].rank
                for n in merge.adapters
                if site.name in adapters[n].factors
            ),
        )
        for site in sites.values()
    }
    sizes = [working_bytes(method, space, shape, ranks) for shape, ranks in kinds if ranks]
    return max(sizes, key=lambda size: size.total, default=SiteBytes(0, 0, 0))
