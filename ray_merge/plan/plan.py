"""Recipe x headers -> what would be read, merged and written, and every refusal that headers can show.

Pure: reads and writes nothing; arithmetic on the headers and configs that `inputs.py` found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_merge.errors import RecipeError
from ray_merge.fit import check_bases, check_owners, fit_adapters
from ray_merge.fit.owners import has_magnitude, is_head
from ray_merge.fit.ranked import distinct
from ray_merge.methods.registry import get, takes_dense
from ray_merge.plan.cross_terms import check_biases, check_ranks
from ray_merge.plan.depth import check_gradients, with_depths
from ray_merge.plan.emr import check_emr, emr_bytes
from ray_merge.plan.export import check_export
from ray_merge.plan.export_class import export_names
from ray_merge.plan.headed import Headed, plan_headed
from ray_merge.plan.layout import OutTensor, Shard, file_bytes, plan_shards, with_replaced
from ray_merge.plan.memory import DEFAULT_MEMORY_BYTES, fit_group
from ray_merge.plan.moments import StageFacts
from ray_merge.plan.statistics import check_data, diagnosis_bytes
from ray_merge.plan.vocabulary import with_vocabulary
from ray_merge.recipe import Recipe
from ray_merge.spec import Adapter, Layout, Merge, Site, TensorEntry
from ray_merge.storage.adapter import StoredAdapter
from ray_merge.storage.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a run needs to know, small enough to send to every worker.

    Args:
        recipe: the validated recipe.
        base: the base checkpoint's headers, with a head of its own where the recipe unties it.
        adapters: by the recipe's names, only those that a merge uses.
        sites: by name.
        renamed: adapter -> runtime parameter -> disk tensors, where the two differ.
        merges: in recipe order.
        shards: of every checkpoint that this recipe writes.
        groups: indices into `merges` that share one pass over the base, in order.
        peak_bytes: estimated resident bytes of one worker.
        warnings: what a person should know; none of it stops the run.
        moments: what the moments that merges need take, where that was asked for.
        headed: name of a merge with `heads` -> what its checkpoint is.
        named: name of a merge with `export_class` -> site -> runtime name of its module there.
    """

    recipe: Recipe
    base: Checkpoint
    adapters: Mapping[str, Adapter]
    sites: Mapping[str, Site]
    renamed: Mapping[str, Mapping[str, tuple[str, ...]]]
    merges: tuple[Merge, ...]
    shards: tuple[Shard, ...]
    groups: tuple[tuple[int, ...], ...]
    peak_bytes: int
    warnings: tuple[str, ...]
    moments: tuple[StageFacts, ...] = ()
    headed: Mapping[str, Headed] = field(default_factory=dict)
    named: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def touched(self, merge: Merge) -> tuple[Site, ...]:
        """The sites that `merge` changes, by tensor and place."""
        different = distinct(self.adapters[name] for name in merge.adapters)
        names = {name for adapter in different for name in adapter.factors}
        return tuple(
            sorted((self.sites[n] for n in names), key=lambda site: (site.tensor, site.start, site.name))
        )

    def module(self, merge: Merge, site: str) -> str:
        """Runtime name of a site's module in an exported `merge`: in `export_class`, or as the first adapter has it."""
        if merge.name in self.named:
            return self.named[merge.name][site]
        return next(a.modules[site] for name in merge.adapters if site in (a := self.adapters[name]).modules)

    def layout(self, merge: Merge, site: str) -> Layout:
        """What kind of layer the adapters of `merge` take a site for: the first of them that touches it."""
        return next(a.layouts[site] for name in merge.adapters if site in (a := self.adapters[name]).layouts)

    def replaced(self, merge: Merge) -> dict[str, tuple[str, TensorEntry]]:
        """Disk tensor -> (adapter, saved tensor) that takes its place in `merge`; heads of several stay apart.

        With `heads` all of them do: the one that is chosen is in `headed`.
        """
        found: dict[str, tuple[str, TensorEntry]] = {}
        heads: set[str] = set()
        for name in merge.adapters:
            adapter = self.adapters[name]
            for tensor, entry in adapter.replaced.items():
                if (tensor in found or merge.heads is not None) and is_head(tensor, adapter):
                    heads.add(tensor)
                found.setdefault(tensor, (name, entry))
        return {tensor: owner for tensor, owner in found.items() if tensor not in heads}

    def resized(self, adapter: Adapter) -> list[str]:
        """Disk names of the tables that an adapter gives another number of rows."""
        tensors = self.base.tensors
        return sorted(name for name, entry in adapter.replaced.items() if entry.shape != tensors[name].shape)

    def tensors(self, merge: Merge, shard: Shard) -> tuple[OutTensor, ...]:
        """What `merge` writes into `shard`."""
        return self._written(merge, shard, self.replaced(merge))

    def _written(
        self, merge: Merge, shard: Shard, replaced: Mapping[str, tuple[str, TensorEntry]]
    ) -> tuple[OutTensor, ...]:
        tensors = with_replaced(shard.tensors, replaced)
        return self.headed[merge.name].with_head(tensors) if merge.name in self.headed else tensors

    def merge_bytes(self, merge: Merge) -> int:
        """Bytes of the weights of `merge`."""
        replaced, headed = self.replaced(merge), self.headed.get(merge.name)
        if not replaced and headed is None:
            return self.checkpoint_bytes
        shards = sum(file_bytes(self._written(merge, shard, replaced)) for shard in self.shards)
        return shards + (headed.added_bytes if headed else 0)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all adapter files."""
        return sum(adapter.file_bytes for adapter in self.adapters.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the shards of one merged checkpoint that replaces nothing."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def n_units(self) -> int:
        """Pieces of work: a shard of a group of merges, what emr adds to a shard, or one exported adapter."""
        exported = sum(merge.export != "checkpoint" for merge in self.merges)
        emr = sum(len(emr_bytes(self, merge)) for merge in self.merges)
        return len(self.groups) * len(self.shards) + emr + exported

    @property
    def read_bytes(self) -> int:
        """Base bytes that a whole run reads: once per group."""
        return self.base.n_bytes * len(self.groups)

    @property
    def write_bytes(self) -> int:
        """Bytes of shards, and of what emr adds to them, that a whole run writes."""
        emr = sum(sum(emr_bytes(self, merge).values()) for merge in self.merges)
        return emr + sum(self.merge_bytes(merge) for merge in self.merges if merge.export != "adapter")


def make_plan(
    recipe: Recipe,
    merges: Sequence[Merge],
    base: Checkpoint,
    stored: Mapping[str, StoredAdapter],
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Plan:
    """Check adapters against the base and lay out the output.

    Args:
        recipe: the validated recipe.
        merges: the merges to plan, expanded.
        base: headers of the base.
        stored: headers of every adapter used.
        memory_bytes: ceiling per worker, for the size of groups.

    Raises:
        Refusal: an adapter that does not fit the base, a merge that cannot be made or exported as asked.
    """
    fitted = fit_adapters(recipe, base, stored)
    base, adapters = fitted.base, fitted.adapters
    sites = with_depths(fitted.sites, base.tensors)
    warnings = check_bases(recipe, adapters)
    checked: set[tuple[str, ...]] = set()
    with_magnitude = _magnitudes(adapters)
    for merge in merges:
        if merge.adapters not in checked:  # a sweep has the same adapters in every merge
            check_owners(merge, adapters, sites)
            _check_vocabulary(merge, base, adapters)
        checked.add(merge.adapters)
        _check_dense(merge, with_magnitude)
        check_biases(merge, adapters)
        check_export(merge, adapters)
        check_emr(merge, adapters)
        check_data(recipe, merge)
        warnings += _filter_warnings(merge, sites)
        warnings += check_gradients(merge, sites, base.url)
    check_ranks(merges, adapters, sites, base.tensors)
    warnings += _vocabulary_warnings(merges, base, adapters)
    headed, about_heads = plan_headed(recipe, base, adapters, sites, merges)
    warnings += about_heads
    checkpoints = [index for index, merge in enumerate(merges) if merge.export != "adapter"]
    looking = diagnosis_bytes(recipe, sites.values())
    group_size, peak = fit_group(merges, adapters, sites, base.tensors, memory_bytes, looking)
    groups = [tuple(checkpoints[i : i + group_size]) for i in range(0, len(checkpoints), group_size)]
    if peak > memory_bytes:
        warnings.append(
            f"one worker needs about {peak / 1e6:.0f} MB, more than the ceiling of {memory_bytes / 1e6:.0f} MB"
        )
    return Plan(
        recipe=recipe,
        base=base,
        adapters=adapters,
        sites=sites,
        renamed=fitted.renamed,
        merges=tuple(merges),
        shards=plan_shards(base.tensors, recipe.out_dtype, recipe.max_shard_size),
        groups=tuple(groups),
        peak_bytes=peak,
        warnings=tuple(warnings),
        headed=headed,
        named=export_names(base, adapters, sites, merges),
    )


def _check_vocabulary(merge: Merge, base: Checkpoint, adapters: Mapping[str, Adapter]) -> None:
    """A resized table needs a vocab_size that can follow it."""
    for name in merge.adapters:
        for tensor, entry in adapters[name].replaced.items():
            before, after = base.tensors[tensor].shape, entry.shape
            if before != after and with_vocabulary(base.config, before[0], after[0]) is None:
                raise RecipeError(
                    f"merge {merge.name!r}: adapter {name} has {after[0]} rows for {tensor}, which has {before[0]} in "
                    f"{base.url}, but its config.json has no vocab_size of {before[0]} that could follow; resize the "
                    "base first"
                )


def _magnitudes(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Adapter -> its first site with a DoRA magnitude, where it has one."""
    # An adapter with magnitudes is a family of its own (storage/family.py).
    found = {adapter.name: has_magnitude([adapter]) for adapter in distinct(adapters.values())}
    return {name: site for name, site in found.items() if site}


def _check_dense(merge: Merge, with_magnitude: Mapping[str, str]) -> None:
    """DoRA's delta is dense, so a rule that works on factors cannot take it."""
    site = next((with_magnitude[name] for name in merge.adapters if name in with_magnitude), "")
    if site and not takes_dense(get(merge.method), merge.parameters):
        raise RecipeError(
            f"merge {merge.name!r}: {merge.method} works on factors, but an adapter is DoRA (at "
            f"{site}), whose delta is "
            "dense; use task_arithmetic, linear, or a method with space: dense"
        )


def _filter_warnings(merge: Merge, sites: Mapping[str, Site]) -> list[str]:
    return [
        f"merge {merge.name!r}: {key} filter {pattern!r} matches no site"
        for key, value in merge.parameters.items()
        for pattern in _filters(value)
        if not any(re.search(pattern, site.name) for site in sites.values())
    ]


def _filters(value: Any) -> list[str]:
    """The patterns of a value that differs between sites; a gradient has one item for each of its knots."""
    items = value if isinstance(value, list) else []
    return list(dict.fromkeys(item["filter"] for item in items if "filter" in item))


def _vocabulary_warnings(
    merges: Sequence[Merge], base: Checkpoint, adapters: Mapping[str, Adapter]
) -> list[str]:
    warnings = []
    for name in sorted({name for merge in merges for name in merge.adapters}):
        adapter = adapters[name]
        grown = [t for t, entry in adapter.replaced.items() if entry.shape != base.tensors[t].shape]
        if grown and not adapter.side_files:
            warnings.append(
                f"adapter {name} has {adapter.replaced[grown[0]].shape[0]} rows in {grown[0]} and no "
                "tokenizer beside it: the "
                "result gets the base's tokenizer, which does not know the new tokens"
            )
    return warnings
