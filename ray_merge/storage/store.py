"""A store: one folder somewhere, seen the same way on a disk, on S3 and on anything else fsspec knows.

Owns the interface, the rules for URLs and relative paths, and the choice of the implementation:

    plain path, file://       `local.LocalStore`      put-if-absent by a hard link
    s3://                     `s3.S3Store`            put-if-absent by If-None-Match (run against SeaweedFS)
    gs://                     `remote.RemoteStore`    put-if-absent by gcsfs' exclusive create (read, not run)
    az://, abfs://            `remote.RemoteStore`    put-if-absent by If-None-Match (run against Azurite)
    hf://, any other fsspec   `remote.RemoteStore`    reading only (memory:// run; hf:// read, not run)

Endpoints and credentials come from where each library looks for them (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_REGION, ... ; fsspec's own configuration files); this package has no settings for them, never reads them,
and keeps them out of URLs, messages and reprs. A store is made in the process that uses it, never pickled;
its methods may be called from several threads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from ray_merge.errors import Refusal, RunFailed, redacted
from ray_merge.storage.retry import clean

TEMPORARY_PREFIX = ".tmp-"
"""File names that begin so are unfinished: never listed, never read as an object, free to delete."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object: `path` relative to its store, and a `version` that differs whenever the bytes may differ.

    The version is an entity tag or blob id where the store has one, else size, time and inode of a file.
    """

    path: str
    n_bytes: int
    version: str


@runtime_checkable
class Store(Protocol):
    """A folder of objects. Paths are relative and '/'-separated; '..' and absolute paths are a Refusal.

    `url` is normalised and free of credentials; `local_root` is the folder when it is a local one.
    Every method raises StoreDenied when the store refuses for good (rights, bucket, region) and StoreError
    when it fails after bounded retries.
    """

    url: str
    local_root: Path | None

    def info(self, path: str) -> ObjectInfo | None:
        """The object at `path`, None when there is none (a folder is none). Never a cached answer."""

    def list(self, prefix: str = "") -> Sequence[ObjectInfo]:
        """All objects under the folder `prefix`, recursively, sorted by path; empty for a missing folder."""

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start`..`end` (default: to the end), exactly that many; a shorter object is a StoreError."""

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """The bytes of each (start, end), in that order; near ranges share a request."""

    def put_if_absent(self, path: str, source: bytes | Path, metadata: Mapping[str, str]) -> bool:
        """Publish `source` under `path` unless something is there; never overwrites, never leaves a part.

        A local file may be hard-linked: do not write to `source` afterwards.

        Args:
            path: the object's name.
            source: all its bytes, or a finished file.
            metadata: small texts kept with the object where the store can; keys match [a-z0-9-]+.

        Returns:
            True: created by this call. False: something was there before (perhaps from an earlier attempt of
            this same call whose answer got lost): compare its sha256 with yours.

        Raises:
            StoreUnfit: the store cannot do this atomically.
        """

    def replace(self, path: str, data: bytes) -> None:
        """Write `data` under `path`, whole or not at all, in place of what was there: reports alone are made anew."""

    def metadata(self, path: str) -> Mapping[str, str]:
        """What `put_if_absent` was given; empty where the store keeps none (local disks): re-hash then."""

    def download(self, path: str, target: Path) -> None:
        """The whole object as file `target`, which appears complete or not at all; replaces an old one."""

    def sub(self, path: str) -> Store:
        """The store of the folder `path`."""

    def pinned(self, files: Sequence[ObjectInfo]) -> Store:
        """The same folder, whose reads of `files` fail when it holds another version of them.

        S3 checks it with each request (RunFailed). Elsewhere nothing does: call `check_unchanged` after the last read.
        """


class NotPickled:
    """A mixin that says why a store does not travel between processes."""

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError(
            f"{type(self).__name__} holds connections of this process and is not pickled: "
            "send its url and call open_store(url) there"
        )


def open_store(url: str) -> Store:
    """The store at `url`; touches no network and no disk.

    Raises:
        Refusal: an unknown protocol, ray://, credentials or a query in the URL, a library that is missing.
    """
    protocol, separator, rest = url.partition("://")
    if not url.strip() or "\0" in url:
        raise Refusal(f"{url!r} is no URL and no path")
    if "::" in url:
        raise Refusal(f"{redact(url)}: chained URLs are not supported; give the folder itself")
    if not separator:
        return _local(os.path.expanduser(url))
    if protocol == "file":
        return _local(_file_path(url))
    if protocol in {"ray", "http", "https"}:
        kind = "an address of a Ray cluster" if protocol == "ray" else "a web page, which cannot be listed"
        raise Refusal(f"{redact(url)} is {kind}, not a folder; known: {known_protocols()}")
    if not rest.strip("/"):
        raise Refusal(f"{redact(url)} names no bucket or folder")
    check_no_credentials(url)
    if protocol in {"s3", "s3a"}:
        from ray_merge.storage.s3 import open_s3  # 0.8 s of imports that local runs do not need

        return open_s3(f"s3://{_normalised(rest)}")
    from ray_merge.storage.remote import open_remote  # likewise

    return open_remote(f"{protocol}://{_normalised(rest)}")


class Stores:
    """Opens stores that share connections: one client per bucket, whose first request costs 0.1 s on S3.

    Made by whoever opens many (a worker, a run) and used in that process alone.
    """

    def __init__(self) -> None:
        self._buckets: dict[str, Store] = {}

    def open(self, url: str) -> Store:
        """Like `open_store(url)`."""
        protocol, _, rest = url.partition("://")
        bucket, _, path = rest.partition("/")
        if protocol not in {"s3", "gs"} or not bucket or not path.strip("/"):
            return open_store(url)
        check_no_credentials(url)
        root = f"{protocol}://{bucket}"
        if root not in self._buckets:
            self._buckets[root] = open_store(root)
        return self._buckets[root].sub(_normalised(path))


def check_unchanged(store: Store, planned: ObjectInfo) -> None:
    """Ask the store whether an object is still the one that the plan saw.

    Raises:
        RunFailed: it is another one, or gone.
    """
    found = store.info(planned.path)
    if found != planned:
        raise changed(store.url, planned.path, planned.version, found)


def read_unchanged(store: Store, planned: ObjectInfo) -> bytes:
    """A whole object as the plan saw it.

    Raises:
        RunFailed: it is another one, or gone.
    """
    data = store.pinned([planned]).read(planned.path, 0, planned.n_bytes)
    check_unchanged(store, planned)
    return data


def changed(url: str, path: str, planned: str, found: ObjectInfo | None) -> RunFailed:
    """The error for an input whose version is no longer `planned`."""
    now = "gone now" if found is None else f"version {found.version} ({found.n_bytes} bytes) now"
    return RunFailed(
        f"{join(url, path)} changed in mid-run: version {planned} when planned, {now}; run the recipe again"
    )


def known_protocols() -> str:
    """The protocols to name in a message."""
    return "a plain path, file://, s3://, gs://, hf://org/name@revision, and others that fsspec knows"


def join(url: str, *parts: str) -> str:
    """`url` with `parts` below it, '/'-separated.

    Raises:
        Refusal: a part is absolute or leads out of the folder.
    """
    base = url if url.endswith("://") or url == "/" else url.rstrip("/")
    for part in parts:
        base = f"{base.rstrip('/')}/{check_path(part, url)}"
    return base


def check_path(path: str, url: str) -> str:
    """`path` itself when it is a relative path inside a store.

    Raises:
        Refusal: it is empty, absolute, or has an empty, '.' or '..' part, a backslash or a control character.
    """
    parts = path.split("/")
    if any(part in {"", ".", ".."} for part in parts) or re.search(r"[\x00-\x1f\x7f\\]", path):
        raise Refusal(f"{path!r} is not a relative path inside {redact(url)}")
    return path


def check_new(path: str, metadata: Mapping[str, str], url: str) -> None:
    """Refuse names and metadata that not every store can keep, so that all stores accept the same."""
    check_path(path, url)
    if path.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX):
        raise Refusal(
            f"{redact(url)}/{path}: names that begin with {TEMPORARY_PREFIX} are kept for unfinished files"
        )
    for key, value in metadata.items():
        if not re.fullmatch(r"[a-z0-9-]+", key) or not re.fullmatch(
            r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", value
        ):
            raise ValueError(f"metadata {key!r}: {value!r} must be [a-z0-9-]+ and printable ASCII")


def check_span(start: int, end: int | None) -> None:
    """Refuse a byte range that no object can have."""
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"({start}, {end}) is no byte range")


def is_temporary(path: str) -> bool:
    """True when a part of `path` marks it as unfinished."""
    return any(part.startswith(TEMPORARY_PREFIX) for part in path.split("/"))


def redact(url: str) -> str:
    """`url` without user name, password and query: fit for messages."""
    return redacted(url) if url.startswith("hf://") else clean(url)


def check_no_credentials(url: str) -> None:
    """Refuse credentials and queries in a folder's URL: they would end up in receipts and model cards."""
    if "?" in url:
        raise Refusal(f"{redact(url)}: a folder's URL takes no query (?...)")
    # hf://name@revision has its @ in the first part, and no user names. A password with a slash in it, as keys of AWS
    # have, ends the first part before its @.
    host = urlsplit(url).netloc
    if ("@" in host and not url.startswith("hf://")) or redacted(url) != url:
        raise Refusal(
            f"{redact(url)}: credentials do not belong into a URL; "
            "set them in the environment or in the library's own configuration file"
        )


def _normalised(rest: str) -> str:
    return "/".join(part for part in rest.split("/") if part)


def _file_path(url: str) -> str:
    host, _, path = url.removeprefix("file://").partition("/")
    if host not in {"", "localhost"}:
        raise Refusal(f"{redact(url)}: a file URL needs three slashes, file:///{host}/{path}")
    if not path.strip("/"):  # an output of `file://` would lie at the root of the machine
        raise Refusal(f"{redact(url)} names no folder")
    return "/" + unquote(path)


def _local(path: str) -> Store:
    from ray_merge.storage.local import LocalStore  # local.py needs this module first

    return LocalStore(Path(os.path.abspath(path)))
