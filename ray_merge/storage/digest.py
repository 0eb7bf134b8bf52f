"""sha256 of local files, computed once per content.

Owns the on-disk memory of digests: one small JSON file per (real path, size, times, inode), written whole or
not at all, so that hashing a 16 GB base happens once on a machine. An entry that cannot be trusted is
computed again. Knows nothing of stores.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path

from ray_merge.errors import StoreError
from ray_merge.storage.local import temporary

SETTLE_SECONDS = 2.0
"""A file changed less than this before it is hashed could change again with the same time stamp (FAT and
some network file systems count in steps of 2 s), so its digest is not remembered."""


def sha256_file(path: str | Path) -> str:
    """sha256 of the file's bytes as 64 hex digits, read in small blocks (the GIL is free meanwhile)."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DigestCache:
    """sha256 of local files, remembered in `folder`. Several processes and threads may share the folder.

    Args:
        folder: made when the first digest is remembered.
        settle_seconds: see SETTLE_SECONDS.
    """

    def __init__(self, folder: Path, *, settle_seconds: float = SETTLE_SECONDS) -> None:
        self._folder = folder
        self._settle_seconds = settle_seconds

    def sha256(self, path: str | Path) -> str:
        """sha256 of the file at `path` as it is now.

        Raises:
            OSError: the file cannot be read.
            StoreError: it changed while it was hashed, or `folder` takes no file.
        """
        real = os.path.realpath(path)
        began = time.time()
        key = _key(real)
        entry = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        known = _recall(entry, key)
        if known is not None:
            return known
        result = sha256_file(real)
        if _key(real) != key:
            raise StoreError(real, "hashing", 1, "it changed meanwhile; wait until nothing writes to it")
        if began - _changed_seconds(real) >= self._settle_seconds:
            self._remember(entry, {"file": key, "sha256": result})
        return result

    def _remember(self, entry: Path, document: dict[str, str]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(entry, document)
        except OSError as error:
            cause = f"{error.strerror}; --cache-dir names another folder"
            raise StoreError(str(self._folder), "remembering digests in", 1, cause) from error


def write_json(path: Path, document: dict[str, str]) -> None:
    """Replace the JSON file at `path` in one step; of several writers at once the last one wins."""
    with temporary(path) as copy:
        copy.write_text(json.dumps(document), encoding="utf-8")
        os.replace(copy, path)


def read_json_texts(path: Path) -> dict[str, str]:
    """The JSON object of texts at `path`; empty when it is missing or anything else, half a file included."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {key: value for key, value in document.items() if isinstance(value, str)}


def is_sha256(text: str) -> bool:
    """True for 64 lower-case hex digits."""
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _recall(entry: Path, key: str) -> str | None:
    document = read_json_texts(entry)
    digest = document.get("sha256", "")
    return digest if document.get("file") == key and is_sha256(digest) else None


def _key(real: str) -> str:
    found = os.stat(real)
    return f"{real}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}|{found.st_ino}"


def _changed_seconds(real: str) -> float:
    found = os.stat(real)
    return max(found.st_mtime_ns, found.st_ctime_ns) / 1e9
