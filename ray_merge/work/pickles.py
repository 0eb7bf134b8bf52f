"""adapter_model.bin on this node: converted once to safetensors, which everything else reads."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from ray_merge.spec import Adapter
from ray_merge.storage.cache import NodeCache
from ray_merge.storage.store import ObjectInfo, Store, Stores, open_store


def converted(pickle: Path, sha256: str, cache: Path) -> Path:
    """The safetensors file of a pickle, made when it is not there; the same pickle always gives the same bytes.

    Args:
        pickle: a complete local file.
        sha256: of it.
        cache: the node's cache.
    """
    from ray_merge.storage.pickled import convert_pickle

    target = cache / "converted" / f"{sha256}.safetensors"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".tmp-{uuid.uuid4().hex[:12]}")
        try:
            convert_pickle(pickle, unfinished)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    return target


def unpickler(cache: Path) -> Callable[[Store, ObjectInfo], Path]:
    """What `read_adapter` asks for the tensors of a pickle: fetched into the node's cache and converted there."""

    def convert(store: Store, info: ObjectInfo) -> Path:
        fetched = NodeCache(cache).fetch(store, info.path, info)
        return converted(fetched.path, fetched.sha256, cache)

    return convert


def safetensors_of(adapter: Adapter, stores: Stores, cache: Path) -> tuple[Store, str]:
    """The store and name of the file that an adapter's entries count their bytes in."""
    store = stores.open(adapter.url)
    if not adapter.pickled:
        return store, adapter.file
    path = unpickler(cache)(store, ObjectInfo(adapter.file, adapter.file_bytes, adapter.file_version))
    return open_store(str(path.parent)), path.name
