"""Moments on this node, for the methods that merge by them: fetched into the node cache, read site by site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_merge.algebra.moments import Moments
from ray_merge.errors import RunFailed
from ray_merge.methods.declare import Method
from ray_merge.methods.registry import statistics_kind
from ray_merge.methods.statistics import InputSide
from ray_merge.spec import Site
from ray_merge.storage.cache import NodeCache
from ray_merge.storage.store import Stores, join
from ray_merge.work.job import MomentsIndex
from ray_merge.work.moments_file import AnyMoments, FisherRows, MomentsFile


class Statistics:
    """The moments of a run, opened on first use, inside one unit.

    Args:
        cache_folder: the node's cache.
        indices: by kind of statistics.
        stores: of this worker.
    """

    def __init__(self, cache_folder: Path, indices: Mapping[str, MomentsIndex], stores: Stores) -> None:
        self._cache = NodeCache(cache_folder)
        self._indices = indices
        self._stores = stores
        self._open: dict[tuple[str, str], MomentsFile] = {}

    def close(self) -> None:
        """Close what was opened."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def inputs(
        self, method: Method, parameters: Mapping[str, Any], adapters: Sequence[str], site: Site
    ) -> dict[str, Any] | None:
        """What the kernel of `method` gets besides factors at a site; nothing where the site has no moments."""
        kind = statistics_kind(method, parameters)
        if not kind:
            return None
        side = self.input_side(kind, site)
        if side is None:
            return {}
        return {"moments": _Lazily(self, self._indices[kind], adapters, site.name), "input_side": side}

    def input_side(self, kind: str, site: Site) -> InputSide | None:
        """Which side of a site's stored weight its inputs are; None where the site has no moments."""
        index = self._indices[kind]
        if site.name in index.unwatched:
            return None
        return "rows" if site.name in index.conv1d else "columns"

    def gram(self, adapter: str, site: Site) -> AnyMoments:
        """The Gram matrix of one adapter's inputs at one site, which may be that of no token at all."""
        found = self.of(self._indices["gram"], adapter, site.name)
        assert not isinstance(found, FisherRows)
        return found

    def of(self, index: MomentsIndex, adapter: str, site: str) -> AnyMoments | FisherRows:
        """The statistics of one adapter at one site."""
        info = index.objects[adapter][site]
        key = (index.store, info.path)
        if key not in self._open:
            cached = self._cache.fetch(self._stores.open(index.store), info.path, info)
            self._open[key] = MomentsFile(cached.path, Path(info.path).stem, join(*key))
        file = self._open[key]
        return file.fisher(site, index.norms[adapter]) if index.norms else file.moments(site)


class _Lazily(Sequence[Any]):
    """One adapter's statistics after another: a Gram matrix of 11008 inputs is 970 MB, so none is kept."""

    def __init__(self, files: Statistics, index: MomentsIndex, adapters: Sequence[str], site: str) -> None:
        self._files, self._index, self._adapters, self._site = files, index, adapters, site

    def __len__(self) -> int:
        return len(self._adapters)

    def __getitem__(self, place: Any) -> Any:
        found = self._files.of(self._index, self._adapters[place], self._site)
        if isinstance(found, Moments) and not found.count:
            raise RunFailed(
                f"no token of {self._adapters[place]}'s data reached {self._site}; take more samples"
            )
        return found

    def __iter__(self) -> Iterator[Any]:
        return (self[place] for place in range(len(self)))
