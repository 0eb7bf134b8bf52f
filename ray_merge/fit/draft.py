"""What is known of one adapter while it is fitted to the base, and the checks that every kind of update shares."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_merge.errors import AdapterError
from ray_merge.fit.resolver import Resolver, example
from ray_merge.models.conversion import Slot
from ray_merge.spec import FLOAT_DTYPES, Layout, SameValues, Site, TensorEntry, TokenRows, Update
from ray_merge.storage.adapter import StoredAdapter


@dataclass(slots=True)
class Draft:
    """An adapter's parts as they are found; `fit/adapters.py` makes the `Adapter` of it.

    Args:
        adapter: what was stored.
        names: its resolver.
        untied: whether the recipe unties head and embedding.
        sites, updates, modules: by site name: the place, what is done to it, the runtime module.
        heads, replaced, tables, tokens, same, ignored: as in `spec.Adapter`.
        proven: disk tensors of which the adapter's own file proves that their tied twin is changed alike.
    """

    adapter: StoredAdapter
    names: Resolver
    untied: bool
    sites: dict[str, Site] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    heads: list[TensorEntry] = field(default_factory=list)
    replaced: dict[str, TensorEntry] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    same: list[SameValues] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    proven: set[str] = field(default_factory=set)

    @property
    def where(self) -> str:
        """How messages call the adapter's weights."""
        return self.adapter.where

    @property
    def base_url(self) -> str:
        """How messages call the base."""
        return self.names.base.url

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a base tensor as this adapter has it: its own table where it resized one."""
        return (
            self.replaced[tensor].shape if tensor in self.replaced else self.names.base.tensors[tensor].shape
        )

    def one_slot(self, parameter: str, what: str) -> Slot:
        """The one disk tensor of a parameter that must exist.

        Raises:
            AdapterError: none, or several.
        """
        slots = self.names.slots(parameter)
        if not slots:
            raise self.unmatched(parameter)
        if len(slots) > 1 or slots[0].expert is not None or slots[0].rows is not None:
            raise AdapterError(
                f"{self.where}: {parameter} is {len(slots)} tensors in {self.base_url}; {what} is not supported there: "
                "merge it with PEFT"
            )
        return slots[0]

    def unmatched(self, parameter: str) -> AdapterError:
        """The error of a name that nothing in the base answers to."""
        base = self.names.base.tensors
        nobody = f"; its model class could not be asked: {self.names.no_class}" if self.names.no_class else ""
        return AdapterError(
            f"{self.where}: {parameter.removesuffix('.weight')} matches nothing in {self.base_url} (the base has, for "
            f"example, {example(parameter, base)}); it was trained on another model, or its names need a "
            f"key_mapping{nobody}"
        )

    def add(self, site: Site, module: str, update: Update) -> None:
        """Note an update of a site; one adapter changes a site once."""
        if site.name in self.updates:
            raise AdapterError(
                f"{self.where}: {self.modules[site.name]} and {module} both change {site.tensor}; the "
                "adapter was saved "
                "from two models"
            )
        self.sites[site.name] = site
        self.updates[site.name] = update
        self.modules[site.name] = module

    def floats(self, tensor: str, module: str) -> TensorEntry:
        """A base tensor that trained values can be added to or written into."""
        entry = self.names.base.tensors[tensor]
        if entry.dtype not in FLOAT_DTYPES.values():
            raise AdapterError(
                f"{self.where}: {module}: base weight {entry.name} is stored as {entry.dtype}, not as floats"
            )
        return entry

    def site(self, slot: Slot, shape: tuple[int, int], layout: Layout, module: str) -> Site:
        """The site of a whole disk tensor."""
        entry = self.floats(slot.tensor, module)
        name = sys.intern(slot.tensor.removesuffix(".weight"))
        if slot.tensor in self.replaced and self.shape(slot.tensor) != entry.shape:
            name += f"[{shape[0]} rows]"
        return Site(name, slot.tensor, shape, 0, layout)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A parameter of any shape as rows: a vector is one column, anything else keeps its last axis."""
    if len(shape) < 2:
        return (shape[0] if shape else 1, 1)
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return (rows, shape[-1])


def by_suffix(patterns: Mapping[str, object] | tuple[str, ...], name: str) -> str | None:
    """PEFT's rule for module lists: the first of `patterns` that `name` ends with."""
    return next((pattern for pattern in patterns if name.endswith(pattern)), None)
