"""Learned coefficients on this node, for the methods that merge by them: fetched into the node cache, read by site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ray_merge.errors import RunFailed
from ray_merge.spec import Site
from ray_merge.storage.cache import NodeCache
from ray_merge.storage.store import Stores, join
from ray_merge.work.job import LEAF, PhiIndex


class LearnedPhi:
    """The phi of a run's merges, opened on first use, inside one unit.

    Args:
        cache_folder: the node's cache.
        indices: by merge name.
        stores: of this worker.
    """

    def __init__(self, cache_folder: Path, indices: Mapping[str, PhiIndex], stores: Stores) -> None:
        self._cache = NodeCache(cache_folder)
        self._indices, self._stores = indices, stores
        self._read: dict[str, Mapping[str, Tensor]] = {}

    def inputs(self, merge: str, site: Site) -> dict[str, Any]:
        """What the kernel of a merge gets besides factors at a site; nothing where the merge has no phi.

        Raises:
            RunFailed: the object is damaged, or holds nothing of the site.
        """
        index = self._indices.get(merge)
        if index is None:
            return {}
        where = join(index.store, index.info.path)
        if merge not in self._read:
            cached = self._cache.fetch(self._stores.open(index.store), index.info.path, index.info)
            try:
                self._read[merge] = safetensors.torch.load_file(cached.path)
            except (safetensors.SafetensorError, OSError) as error:
                raise RunFailed(f"{where} is damaged; remove it and run again") from error
        leaf = LEAF + index.leaves.get(site.name, "")
        if leaf not in self._read[merge]:
            raise RunFailed(f"{where} holds no phi of {site.name}; remove it and run again")
        return {"phi": self._read[merge][leaf]}
