"""Files of remote stores on this node's disk: downloaded once per node, shared by its processes, mapped by them.

Owns the cache folder's layout, one folder per (URL, path, version, length):

    <key>/lock       flock of whoever downloads
    <key>/data       the bytes, renamed into place when complete
    <key>/entry.json url, path, version, sha256; written last: data without a matching entry does not count

Local files are used where they lie. Never evicts: a cache folder may be deleted while nothing runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_merge.errors import Refusal, StoreError
from ray_merge.storage.digest import DigestCache, is_sha256, read_json_texts, sha256_file, write_json
from ray_merge.storage.store import TEMPORARY_PREFIX, ObjectInfo, Store, join, open_store


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/ray-merge`, else `~/.cache/ray-merge`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray-merge"


def cache_folder(given: str | Path | None) -> Path:
    """The node's cache folder as an absolute path: the given one, or the default.

    Raises:
        Refusal: this user cannot make it or write into it.
    """
    folder = Path(default_cache_dir() if given is None else given).expanduser().absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    writable = os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK, effective_ids=True)
    if not writable:
        why = "may not be written to" if os.path.isdir(there) else "is no folder"
        raise Refusal(f"{folder} cannot be the cache folder: {there} {why}; --cache-dir names another one")
    return folder


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A complete local file, and the sha256 of its bytes (64 hex digits)."""

    path: Path
    sha256: str


class NodeCache:
    """Local copies in `folder`. Several processes and threads may use the same folder at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests = DigestCache(folder / "digests")

    def fetch(self, store: str | Store, path: str, info: ObjectInfo) -> CachedFile:
        """A local file with the bytes of version `info.version` of `path`.

        Args:
            store: a store, or its URL.
            path: the object, relative to the store.
            info: what the plan saw of it.

        Raises:
            StoreError: the object is not (or no longer) what `info` says, or could not be read, or `folder` takes no
                file.
        """
        source = open_store(store) if isinstance(store, str) else store
        if source.local_root is not None:
            _check_version(source, path, info)
            file = source.local_root / path
            return CachedFile(file, self._digests.sha256(file))
        folder = self._folder / _key(source.url, path, info)
        try:
            cached = _complete(folder, info)
            if cached is not None:
                return cached
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / "lock"):
                # Another process may have finished while this one waited.
                return _complete(folder, info) or _download(source, path, info, folder)
        except OSError as error:  # many a disk finds only at fsync or rename that it is full
            cause = f"{folder}: {error.strerror or error}; --cache-dir names another folder"
            raise StoreError(join(source.url, path), "downloading", 1, cause) from error


def _download(source: Store, path: str, info: ObjectInfo, folder: Path) -> CachedFile:
    for left_over in folder.glob(f"{TEMPORARY_PREFIX}*"):  # of a killed process: we hold the lock
        left_over.unlink(missing_ok=True)
    (folder / "entry.json").unlink(missing_ok=True)
    data = folder / "data"
    source.download(path, data)
    # Hashed before the version is checked again: the digest is of bytes that are that version's.
    sha256 = sha256_file(data)
    _check_version(source, path, info)
    if data.stat().st_size != info.n_bytes:
        raise StoreError(
            join(source.url, path), "downloading", 1, f"{data.stat().st_size} bytes came, not {info.n_bytes}"
        )
    entry = {"url": source.url, "path": path, "version": info.version, "sha256": sha256}
    write_json(folder / "entry.json", entry)
    return CachedFile(data, sha256)


def _complete(folder: Path, info: ObjectInfo) -> CachedFile | None:
    sha256 = read_json_texts(folder / "entry.json").get("sha256", "")
    data = folder / "data"
    try:
        whole = data.stat().st_size == info.n_bytes
    except FileNotFoundError:
        return None
    return CachedFile(data, sha256) if whole and is_sha256(sha256) else None


def _check_version(source: Store, path: str, info: ObjectInfo) -> None:
    found = source.info(path)
    if found is None or (found.n_bytes, found.version) != (info.n_bytes, info.version):
        now = "gone" if found is None else f"version {found.version} with {found.n_bytes} bytes"
        cause = f"it was version {info.version} with {info.n_bytes} bytes when planned and is now {now}"
        raise StoreError(join(source.url, path), "reading", 1, f"{cause}; plan again")


def _key(url: str, path: str, info: ObjectInfo) -> str:
    return hashlib.sha256(json.dumps([url, path, info.version, info.n_bytes]).encode()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The kernel drops the lock when its holder dies, so a kill leaves nothing locked.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
