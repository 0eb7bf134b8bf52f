"""The updates of a plain LoRA adapter as those of another one with the same modules, at a rank and scale of its own.

Owns the proof that an adapter's fit to a base depends on nothing else, and what is shared by all that fit alike:
a thousand adapters with 882 modules each take 15 kB apiece beside one fit, and 3 GB where each is fitted by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ray_merge.fit.draft import Draft
from ray_merge.fit.tied import TABLE_WORDS
from ray_merge.models.names import Naming, find_naming
from ray_merge.spec import Adapter, FactorEntry, Product, Site, Update, View
from ray_merge.storage.adapter import StoredAdapter
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.family import Member

PLAIN_LAYOUTS = frozenset({"linear", "conv1d"})


class RankedFactors(Mapping[str, Update]):
    """Site name -> update, made when it is looked at.

    Args:
        like: the updates of the adapter of the same family that was fitted.
        member: the headers of this one.
        scale: of every product.
    """

    __slots__ = ("like", "member", "scale")

    def __init__(self, like: Mapping[str, Update], member: Member, scale: float) -> None:
        self.like = like
        self.member = member
        self.scale = scale

    def __getitem__(self, site: str) -> FactorEntry:
        update = self.like[site]
        assert isinstance(update, FactorEntry)
        (product,) = update.products
        assert product.A is not None
        return FactorEntry((Product(self._view(product.B), self._view(product.A), self.scale),))

    def __contains__(self, site: object) -> bool:
        return site in self.like

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)

    @property
    def rank(self) -> int:
        """Of every update."""
        return self.member.rank

    def _view(self, view: View) -> View:
        entry = self.member.entry(self.member.family.index[view.entry.name])
        return replace(view, entry=entry, shape=entry.shape)


def alike(factors: Mapping[str, Update]) -> Mapping[str, Update]:
    """The updates that stand for `factors` in all but ranks, scales and offsets; one object for all of a family."""
    return factors.like if isinstance(factors, RankedFactors) else factors


def distinct(adapters: Iterable[Adapter]) -> list[Adapter]:
    """The first adapter of each family: whether adapters fit together shows at these, whatever their ranks."""
    found: dict[tuple[int, ...], Adapter] = {}
    for adapter in adapters:
        parts = (alike(adapter.factors), adapter.modules, adapter.layouts, adapter.replaced, adapter.tokens)
        found.setdefault(tuple(map(id, parts)), adapter)
    return list(found.values())


class FittedFamily:
    """One fitted adapter, and the others of its family as copies of it.

    Args:
        adapter: the one that was fitted.
        stored: the same as it was read.
        renamed: its runtime parameters -> disk tensors, where the two differ.
    """

    def __init__(
        self, adapter: Adapter, stored: StoredAdapter, renamed: Mapping[str, tuple[str, ...]]
    ) -> None:
        assert stored.member is not None
        self.renamed = renamed
        self._adapter = adapter
        # Equal headers are one member (storage/family.py): their adapters share one mapping.
        self._factors = {(id(stored.member), scale_of(stored)): adapter.factors}
        self._members = {id(stored.member): stored.member}

    def fitted(self, stored: StoredAdapter) -> Adapter:
        """Another adapter of the family."""
        member = stored.member
        assert member is not None
        self._members.setdefault(id(member), member)  # an id is its own as long as it lives
        scale = scale_of(stored)
        key = (id(member), scale)
        if key not in self._factors:
            self._factors[key] = RankedFactors(alike(self._adapter.factors), member, scale)
        return replace(
            self._adapter,
            name=stored.name,
            url=stored.url,
            config=stored.config,
            factors=self._factors[key],
            file_bytes=stored.file_bytes,
            file_version=stored.file_version,
        )


class FittedModules:
    """Linear modules that were fitted, each of which becomes the same site whatever else an adapter has.

    An adapter of which every module is known so needs no fit of its own: adapters of one base choose from the same
    few hundred modules, in ever other ways.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._known: dict[tuple[Naming, str, str, int, int], tuple[Site, FactorEntry]] = {}

    def learn(self, draft: Draft) -> None:
        """Keep the modules of a plain fit, if none of them could have asked for the others or the model class."""
        if draft.names.asked_class or draft.adapter.settings.transposed:
            return
        for name, site in draft.sites.items():
            module, update = draft.modules[name], draft.updates[name]
            if site.layout == "linear" and isinstance(update, FactorEntry) and _stands_alone(module, site):
                A, B = update.products[0].A, update.products[0].B
                assert A is not None
                # One module has other tensor names in other files (PEFT's prefix, `default.`), and a copy of an
                # update looks its tensors up by name.
                key = (draft.names.naming, A.entry.name, B.entry.name, A.shape[1], B.shape[0])
                self._known[key] = (site, update)

    def fitted(self, stored: StoredAdapter) -> tuple[Adapter, Mapping[str, tuple[str, ...]]] | None:
        """The adapter made of known modules, and its renamed parameters; None where it must be fitted."""
        member = stored.member
        if member is None or stored.settings.transposed or not self._known:
            return None
        family = member.family
        naming = find_naming({f"{name}.weight" for name, _, _ in family.modules}, self._base.tensors)
        like: dict[str, Update] = {}
        modules: dict[str, str] = {}
        renamed: dict[str, tuple[str, ...]] = {}
        for name, A, B in family.modules:
            key = (naming, family.names[A], family.names[B], family.others[A], family.others[B])
            found = self._known.get(key)
            if found is None:
                return None
            site, like[site.name] = found
            modules[site.name] = name
            if site.tensor != f"{name}.weight":
                renamed[f"{name}.weight"] = (site.tensor,)
        if len(like) < len(family.modules):
            return None  # two modules of one tensor, which the fit refuses
        adapter = Adapter(
            name=stored.name,
            url=stored.url,
            config=stored.config,
            factors=RankedFactors(like, member, scale_of(stored)),
            modules=modules,
            layouts=dict.fromkeys(like, "linear"),
            heads=(),
            replaced={},
            tables=frozenset(),
            tokens={},
            same=(),
            ignored={},
            names=naming.describe(),
            file=stored.file,
            file_bytes=stored.file_bytes,
            file_version=stored.file_version,
        )
        return adapter, renamed


def _stands_alone(module: str, site: Site) -> bool:
    # The out_proj of an attention depends on its parent, an embedding or a head on what the base ties.
    words = (*TABLE_WORDS, "wpe")
    return not module.endswith("out_proj") and not any(
        word in module or word in site.tensor for word in words
    )


def scale_of(stored: StoredAdapter) -> float:
    """The one scale of an adapter without patterns."""
    scaling = stored.settings.scaling
    return scaling.scale_of("", scaling.r)


def is_plain(draft: Draft) -> bool:
    """Whether nothing of this fit depends on more than names, layouts and the lengths that are no rank."""
    if draft.heads or draft.replaced or draft.tokens or draft.same or draft.ignored or not draft.updates:
        return False
    scale = scale_of(draft.adapter)
    return all(
        site.layout in PLAIN_LAYOUTS and _is_plain(draft.updates[name], scale)
        for name, site in draft.sites.items()
    )


def _is_plain(update: Update, scale: float) -> bool:
    if not isinstance(update, FactorEntry) or len(update.products) != 1 or update.magnitude is not None:
        return False
    product = update.products[0]
    return product.scale == scale and all(
        view is not None and view == View(view.entry, view.entry.shape, transpose=view.transpose)
        for view in (product.B, product.A)
    )
