"""Adapters on this node: fetched once into the node cache, checked once, read site by site.

Actors hold frozen weights only, and not even those here: factors are read from the node's file cache when a
site needs them (the page cache keeps them), so a worker's memory does not grow with the number of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ray_merge.algebra.site import SiteFactors
from ray_merge.errors import NotFinite
from ray_merge.spec import Adapter, Factor
from ray_merge.storage.cache import CachedFile, NodeCache
from ray_merge.storage.store import ObjectInfo, Stores
from ray_merge.work.job import AdapterCheck
from ray_merge.work.tensors import TORCH_DTYPES, TensorFile


class AdapterFiles:
    """Local files of adapters, opened on first use; use as a context manager inside one unit.

    Args:
        cache_folder: the node's cache.
        stores: of this worker.
        adapters: by name.
        device: where factors are put.
        dtype: arithmetic dtype; float64 makes every later step float64.
    """

    def __init__(
        self,
        cache_folder: Path,
        adapters: Mapping[str, Adapter],
        stores: Stores,
        *,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        self._cache = NodeCache(cache_folder)
        self._stores = stores
        self._adapters = adapters
        self._device = device
        self._dtype = dtype
        self._open: dict[str, TensorFile] = {}

    def __enter__(self) -> AdapterFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def fetch(self, name: str) -> CachedFile:
        """The adapter's weights file on this node."""
        adapter = self._adapters[name]
        planned = ObjectInfo(adapter.file, adapter.file_bytes, adapter.file_version)
        return self._cache.fetch(self._stores.open(adapter.url), adapter.file, planned)

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = TensorFile(self.fetch(name).path)
        return self._open[name]

    def check(self, name: str) -> AdapterCheck:
        """Fetch one adapter and look at every number of it.

        Raises:
            NotFinite: a factor or head holds NaN or Inf.
        """
        adapter = self._adapters[name]
        cached = self.fetch(name)
        file = self._file(name)
        entries = [entry for pair in adapter.factors.values() for entry in (pair.B, pair.A)]
        floats = [entry for entry in [*entries, *adapter.heads] if entry.dtype in TORCH_DTYPES]
        for entry in floats:
            tensor = file.read(entry)
            finite = torch.isfinite(tensor)
            if not bool(finite.all()):
                count = int(tensor.numel() - finite.sum())
                raise NotFinite(name, entry.name, count, f"{adapter.url}/{adapter.file}")
        return AdapterCheck(name, cached.sha256, adapter.file_bytes, len(entries) + len(adapter.heads))

    def site(self, names: Sequence[str], site: str, shape: tuple[int, int]) -> SiteFactors:
        """Factors of the adapters at one site, in order; rank 0 for an adapter that does not touch it."""
        return SiteFactors([self._factor(name, site, shape) for name in names])

    def _factor(self, name: str, site: str, shape: tuple[int, int]) -> Factor:
        entry = self._adapters[name].factors.get(site)
        if entry is None:
            empty_OR = torch.empty((shape[0], 0), dtype=self._dtype, device=self._device)
            return Factor(empty_OR, torch.empty((0, shape[1]), dtype=self._dtype, device=self._device))
        file = self._file(name)
        B_OR, A_RI = (file.read(side).to(self._device, self._dtype) for side in (entry.B, entry.A))
        return Factor(B_OR, A_RI, entry.scale)
