"""Adapters on this node: fetched once into the node cache, checked once, read site by site.

Actors hold frozen weights only, and not even those here: factors are read from the node's file cache when a
site needs them (the page cache keeps them), so a worker's memory does not grow with the number of adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ray_merge.algebra.site import SiteFactors
from ray_merge.errors import AdapterError, NotFinite
from ray_merge.spec import (
    Adapter,
    Factor,
    FactorEntry,
    Product,
    SameValues,
    SavedEntry,
    Site,
    TensorEntry,
    needs_base,
    used_entries,
)
from ray_merge.storage.cache import CachedFile, NodeCache
from ray_merge.storage.store import ObjectInfo, Stores
from ray_merge.work.job import AdapterCheck, MomentsIndex, PhiIndex
from ray_merge.work.phi import LearnedPhi
from ray_merge.work.pickles import converted
from ray_merge.work.statistics import Statistics
from ray_merge.work.tensors import TORCH_DTYPES, TensorFile, to_bytes

Base = Callable[[], Tensor]
"""Gives the base weight of the site at hand as a matrix, in the dtype it is stored in."""


class AdapterFiles:
    """Local files of adapters, opened on first use; use as a context manager inside one unit.

    Args:
        cache_folder: the node's cache.
        stores: of this worker.
        adapters: by name.
        device: where factors are put.
        dtype: arithmetic dtype; float64 makes every later step float64.
        moments: by kind of statistics, for methods that merge by them.
        phi: by merge name, for methods that merge by learned coefficients.

    Attributes:
        statistics: those moments, for kernels.
        learned: that phi, for kernels.
    """

    def __init__(
        self,
        cache_folder: Path,
        adapters: Mapping[str, Adapter],
        stores: Stores,
        *,
        device: str,
        dtype: torch.dtype,
        moments: Mapping[str, MomentsIndex] | None = None,
        phi: Mapping[str, PhiIndex] | None = None,
    ) -> None:
        self.statistics = Statistics(cache_folder, moments or {}, stores)
        self.learned = LearnedPhi(cache_folder, phi or {}, stores)
        self._folder = cache_folder
        self._cache = NodeCache(cache_folder)
        self._stores = stores
        self._adapters = adapters
        self._device = device
        self._dtype = dtype
        self._open: dict[str, TensorFile] = {}

    def __enter__(self) -> AdapterFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.statistics.close()
        for file in self._open.values():
            file.close()
        self._open.clear()

    def fetch(self, adapter: Adapter) -> CachedFile:
        """An adapter's weights file on this node, as it is stored."""
        planned = ObjectInfo(adapter.file, adapter.file_bytes, adapter.file_version)
        return self._cache.fetch(self._stores.open(adapter.url), adapter.file, planned)

    def open(self, adapter: Adapter) -> TensorFile:
        """The tensors of an adapter's file; a pickle is converted on this node first."""
        if adapter.name not in self._open:
            cached = self.fetch(adapter)
            path = converted(cached.path, cached.sha256, self._folder) if adapter.pickled else cached.path
            self._open[adapter.name] = TensorFile(path)
        return self._open[adapter.name]

    def saved(self, name: str) -> TensorFile:
        """The file of the adapter called `name`, for tensors that take a base tensor's place."""
        return self.open(self._adapters[name])

    def check(self, name: str) -> AdapterCheck:
        """Fetch one adapter and look at every number of it.

        Raises:
            NotFinite: a tensor that enters the merge holds NaN or Inf.
            AdapterError: two tensors that must be equal are not.
        """
        adapter = self._adapters[name]
        self._check_finite(adapter, _entries(adapter))
        if adapter.initial is not None:
            self._check_finite(adapter.initial, _initial_entries(adapter))
        for same in adapter.same:
            self._check_same(adapter, same)
        tables = {
            tensor: self._digest(adapter, adapter.replaced[tensor]) for tensor in sorted(adapter.tables)
        }
        cached = self.fetch(adapter)
        return AdapterCheck(name, cached.sha256, adapter.file_bytes, len(_entries(adapter)), tables)

    def _check_finite(self, adapter: Adapter, entries: Sequence[TensorEntry]) -> None:
        file = self.open(adapter)
        for entry in entries:
            if entry.dtype not in TORCH_DTYPES:
                continue
            count = sum(int((~torch.isfinite(piece)).sum()) for piece in file.pieces(entry))
            if count:
                raise NotFinite(adapter.name, entry.name, count, f"{adapter.url}/{adapter.file}")

    def _check_same(self, adapter: Adapter, same: SameValues) -> None:
        file = self.open(adapter)
        if same.one.transpose or same.other.transpose:
            pairs = iter([(file.matrix(same.one), file.matrix(same.other))])
        else:
            pairs = zip(file.pieces(same.one.entry), file.pieces(same.other.entry), strict=True)
        for one, other in pairs:
            if not torch.equal(one.double(), other.double()):
                off = float((one.double() - other.double()).abs().max())
                raise AdapterError(f"{same.why} (they differ by up to {off:.3g})")

    def _digest(self, adapter: Adapter, entry: TensorEntry) -> str:
        """sha256 of the values, whatever dtype they were saved in."""
        digest = hashlib.sha256()
        for piece in self.open(adapter).pieces(entry):
            digest.update(to_bytes(piece.double()))
        return digest.hexdigest()

    def site(self, names: Sequence[str], site: Site, base: Base) -> SiteFactors:
        """Updates of the adapters at one site, in order; rank 0 for an adapter that does not touch it.

        Args:
            names: of the adapters.
            site: where.
            base: asked for only where an update depends on the base weight.
        """
        updates = [self._adapters[name].factors.get(site.name) for name in names]
        base_OI = base().to(self._device) if any(map(needs_base, updates)) else None
        factors = [self._factor(name, site, base_OI) for name in names]
        return SiteFactors(factors, base_OI)

    def _factor(self, name: str, site: Site, base_OI: Tensor | None) -> Factor:
        adapter = self._adapters[name]
        update = adapter.factors.get(site.name)
        if update is None:
            empty_OR = torch.empty((site.shape[0], 0), dtype=self._dtype, device=self._device)
            return Factor(empty_OR, torch.empty((0, site.shape[1]), dtype=self._dtype, device=self._device))
        if isinstance(update, SavedEntry):
            assert base_OI is not None
            return _saved_factor(self._ready(self.open(adapter).matrix(update.saved)), base_OI)
        products = [self._product(adapter, update, index) for index in range(len(update.products))]
        factor = products[0] if len(products) == 1 else _joined(products)
        if update.magnitude is None:
            return factor
        magnitude = self._ready(self.open(adapter).matrix(update.magnitude))
        return Factor(factor.B, factor.A, factor.scale, magnitude)

    def _product(self, adapter: Adapter, update: FactorEntry, index: int) -> Factor:
        is_initial = index >= len(update.products) - update.initial
        source = adapter.initial if is_initial else adapter
        assert source is not None
        product: Product = update.products[index]
        file = self.open(source)
        B_OR = self._ready(file.matrix(product.B))
        if product.A is None:
            A_RI = torch.eye(product.rank, dtype=self._dtype, device=self._device)
        else:
            A_RI = self._ready(file.matrix(product.A))
        return Factor(B_OR, A_RI, product.scale)

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)


def _entries(adapter: Adapter) -> list[TensorEntry]:
    """Every stored tensor of an adapter that a merge uses, in file order."""
    entries = list(used_entries(adapter.factors.values()))
    entries += [view.entry for same in adapter.same for view in (same.one, same.other)]
    entries += [*adapter.heads, *adapter.replaced.values(), *(rows.entry for rows in adapter.tokens.values())]
    # By place: a head has two names, its own in the file and the runtime's.
    return sorted({entry.start: entry for entry in entries}.values(), key=lambda entry: entry.start)


def _initial_entries(adapter: Adapter) -> list[TensorEntry]:
    """The tensors of its initial adapter that are taken away."""
    return list(used_entries(adapter.factors.values(), initial=True))


def _saved_factor(saved_OI: Tensor, base_OI: Tensor) -> Factor:
    """`saved - base` as a product with an identity on its smaller side, so that every method can take it."""
    delta_OI = saved_OI - base_OI.to(saved_OI.dtype)
    rows, columns = delta_OI.shape
    identity = torch.eye(min(rows, columns), dtype=delta_OI.dtype, device=delta_OI.device)
    return Factor(delta_OI, identity) if columns <= rows else Factor(identity, delta_OI)


def _joined(products: Sequence[Factor]) -> Factor:
    """A sum of products as one: [B_1 B_2] [s_1 A_1; s_2 A_2]."""
    B_OR = torch.cat([product.B for product in products], dim=1)
    return Factor(B_OR, torch.cat([product.A * product.scale for product in products], dim=0))


def token_rows(
    adapters: Mapping[str, Adapter], names: Sequence[str], tensor: str
) -> Iterator[tuple[str, TensorEntry, tuple[int, ...]]]:
    """(adapter, stored rows, row numbers) of every adapter that trained tokens of a table."""
    for name in names:
        rows = adapters[name].tokens.get(tensor)
        if rows is not None:
            yield name, rows.entry, rows.indices
