"""A store behind fsspec: byte ranges in parallel, bounded retries, errors in one sentence without secrets.

Owns everything but S3's writing and single GETs (`s3.S3Store`). Writing here means an exclusive create of
the library: gcsfs sends ifGenerationMatch=0, adlfs If-None-Match. fsspec's own mode="create" looks first and writes
then, so every other store is refused.

Run in tests: s3:// on SeaweedFS (as the base of S3Store), memory://; az:// on Azurite where one is installed.
Read in their sources, not run: gs:// with gcsfs 2026.10, hf:// with huggingface_hub 2.4.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from ray_merge.errors import Refusal, StoreError, StoreUnfit
from ray_merge.storage.local import make_folder, sync_folder, temporary, write_at
from ray_merge.storage.ranges import Piece, Request, assemble, cut, plan_requests
from ray_merge.storage.retry import Backoff, error_code, final_error, is_already_there, is_transient, retrying
from ray_merge.storage.store import (
    NotPickled,
    ObjectInfo,
    check_new,
    check_path,
    check_span,
    is_temporary,
    join,
    known_protocols,
)

S = TypeVar("S")
T = TypeVar("T")

GAP_BYTES = 256 * 1024
"""At 100 MB/s a gap of this length costs 2.5 ms, less than the round trip of one more request."""

SHARED_BYTES = 4 * 1024 * 1024
REQUEST_BYTES = 16 * 1024 * 1024
LONGEST_REQUEST_BYTES = 128 * 1024 * 1024
"""A retry reads so much again at most."""

THREADS = 8

_WIRE_LOGS = ("aiobotocore", "botocore", "gcsfs", "google.auth")
"""At DEBUG they write whole requests: session tokens, and endpoints with whatever credentials stand in them."""

_EXCLUSIVE_CREATE = frozenset({"gs", "gcs", "az", "abfs", "abfss"})
_NO_METADATA = frozenset({"az", "abfs", "abfss"})
"""adlfs gives every object metadata of its own and takes no other: who needs a digest hashes the object."""


class RemoteStore(NotPickled):
    """The folder `root` of the fsspec file system `fs`. See `store.Store` for what each method promises."""

    def __init__(self, fs: Any, root: str, url: str, backoff: Backoff) -> None:
        self.url = url
        self.local_root: Path | None = None
        self._fs = fs
        self._root = root
        self._backoff = backoff

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def info(self, path: str) -> ObjectInfo | None:
        """The object at `path`, asked from the store each time."""
        key = self._key(path)

        def look() -> ObjectInfo | None:
            try:
                found = self._fs.info(key, **self._fresh())
            except FileNotFoundError as error:
                if error_code(error) == "NoSuchBucket":
                    raise
                return None
            return _info(path, found) if found["type"] == "file" and not is_temporary(path) else None

        return self._retrying("looking up", path, look)

    def list(self, prefix: str = "") -> Sequence[ObjectInfo]:
        """One pass over the store's own recursive listing."""
        root = self._key(prefix) if prefix else self._root

        def find() -> Mapping[str, Mapping[str, Any]]:
            try:
                found: Mapping[str, Mapping[str, Any]] = self._fs.find(root, detail=True, **self._fresh())
            except FileNotFoundError as error:
                if error_code(error) == "NoSuchBucket":
                    raise
                return {}
            return found

        start = f"{check_path(prefix, self.url)}/" if prefix else ""
        listed = self._retrying("listing", prefix, find)
        above = f"{self._listed_root(root).rstrip('/')}/"
        objects = [
            _info(start + name.removeprefix(above), found)
            for name, found in listed.items()
            # Keys that end in "/" are folder markers of web consoles; a key equal to the root is no child.
            if found["type"] == "file" and name.startswith(above) and not name.endswith("/")
        ]
        return sorted((o for o in objects if not is_temporary(o.path)), key=lambda info: info.path)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start`..`end`, in parallel requests when there are many."""
        check_span(start, end)
        if end is None:
            end = max(start, self._present(path).n_bytes)
        return self.read_ranges(path, [(start, end)])[0]

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Each range, near ones in one request, THREADS requests at a time."""
        requests = plan_requests(
            ranges, gap_bytes=GAP_BYTES, shared_bytes=SHARED_BYTES, request_bytes=_request_bytes(ranges)
        )

        def fetch(request: Request) -> Iterable[tuple[Piece, bytes]]:
            return cut(request, self._get(path, request.start, request.end))

        answers = [*parallel(fetch, requests)]
        # Given away one by one: a range that is joined from pieces frees them at once, or all bytes were held twice.
        return assemble(len(ranges), (piece for _ in range(len(answers)) for piece in answers.pop()))

    def put_if_absent(self, path: str, source: bytes | Path, metadata: Mapping[str, str]) -> bool:
        """Exclusive create where the library makes it one request; StoreUnfit elsewhere."""
        check_new(path, metadata, self.url)
        protocol = self.url.partition("://")[0]
        if protocol not in _EXCLUSIVE_CREATE:
            raise StoreUnfit(self.url, f"fsspec has no atomic create for {protocol}://")
        key = self._key(path)
        kept: dict[str, Any] = {} if protocol in _NO_METADATA else {"metadata": dict(metadata)}

        def put() -> bool:
            try:
                if isinstance(source, Path):
                    self._fs.put_file(str(source), key, mode="create", **kept)
                else:
                    self._fs.pipe_file(key, source, mode="create", **kept)
            except Exception as error:
                if is_already_there(error):
                    return False
                raise
            return True

        return self._retrying("writing", path, put)

    def replace(self, path: str, data: bytes) -> None:
        """One unconditional write over this store's own connections."""
        check_new(path, {}, self.url)
        self._retrying("writing", path, lambda: self._fs.pipe_file(self._key(path), data))

    def metadata(self, path: str) -> Mapping[str, str]:
        """User metadata as gcsfs lists it; empty where the library shows none."""
        key = self._key(path)
        found = self._retrying("reading", path, lambda: self._fs.info(key, **self._fresh()))
        return dict(found.get("metadata") or {})

    def download(self, path: str, target: Path) -> None:
        """The object in parallel pieces to a temporary file, checked, fsynced and renamed."""
        before = self._present(path)
        make_folder(target.parent)
        with temporary(target) as copy:
            with open(copy, "xb") as file:

                def fetch(start: int) -> None:
                    self._copy(path, start, min(start + REQUEST_BYTES, before.n_bytes), file.fileno())

                parallel(fetch, range(0, before.n_bytes, REQUEST_BYTES))
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
            if size != before.n_bytes or self.info(path) != before:
                cause = f"it changed while it was read ({before.n_bytes} bytes, {before.version} at first)"
                raise StoreError(join(self.url, path), "downloading", 1, cause)
            os.replace(copy, target)
        sync_folder(target.parent)

    def sub(self, path: str) -> RemoteStore:
        """The store of the folder `path`, over the same connections."""
        return RemoteStore(self._fs, self._key(path), join(self.url, path), self._backoff)

    def pinned(self, files: Sequence[ObjectInfo]) -> RemoteStore:
        """This store: fsspec's reads take no version that all stores know."""
        return self

    def _key(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{check_path(path, self.url)}"

    def _present(self, path: str) -> ObjectInfo:
        found = self.info(path)
        if found is None:
            raise StoreError(join(self.url, path), "reading", 1, "no such object")
        return found

    def _fetch(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start`..`end` in one request, tried once; fewer when no more came."""
        data: bytes = self._fs.cat_file(self._key(path), start=start, end=end)
        return data

    def _fetch_into(self, path: str, start: int, end: int, target: int) -> int:
        """The same, written to the same place of the open file `target`; how many came."""
        return write_at(target, self._fetch(path, start, end), start)

    def _get(self, path: str, start: int, end: int) -> bytes:
        def get() -> bytes:
            data = self._fetch(path, start, end)
            self._check_whole(path, start, end, len(data))
            return data

        return self._retrying("reading", path, get)

    def _copy(self, path: str, start: int, end: int, target: int) -> None:
        def copy() -> None:
            self._check_whole(path, start, end, self._fetch_into(path, start, end, target))

        self._retrying("downloading", path, copy)

    def _check_whole(self, path: str, start: int, end: int, n_bytes: int) -> None:
        if n_bytes == end - start:
            return
        found = self.info(path)
        if found is not None and found.n_bytes < end:
            cause = f"it is {found.n_bytes} bytes long, wanted {start}..{end}: truncated or replaced"
            raise StoreError(join(self.url, path), "reading", 1, cause)
        raise ConnectionError(f"{n_bytes} bytes came for {start}..{end}")

    def _fresh(self) -> dict[str, bool]:
        # HfFileSystem keeps listings whatever use_listings_cache says.
        return {"refresh": True} if self.url.startswith("hf://") else {}

    def _listed_root(self, root: str) -> str:
        # HfFileSystem lists under the resolved revision's own spelling.
        return str(self._fs.resolve_path(root).unresolve()) if self.url.startswith("hf://") else root

    def _retrying(
        self,
        action: str,
        path: str,
        call: Callable[[], T],
        also: Callable[[Exception], bool] = lambda _: False,
    ) -> T:
        url = join(self.url, path) if path else self.url
        return retrying(
            call,
            retriable=lambda error: is_transient(error) or also(error),
            give_up=lambda error, tries: final_error(error, url, action, tries),
            backoff=self._backoff,
        )


def open_remote(url: str, backoff: Backoff | None = None) -> RemoteStore:
    """The store at `url` of any protocol but s3://, see `store.open_store`."""
    protocol = url.partition("://")[0]
    fs = make_filesystem(protocol, url)
    return RemoteStore(fs, str(fs._strip_protocol(url)), url, backoff or Backoff())


def make_filesystem(protocol: str, url: str, **settings: Any) -> Any:
    """A file system of this process alone: fsspec's instance cache would keep old credentials.

    Whoever logs everything at DEBUG does not ask for secrets: the libraries' logs of requests begin at INFO, unless
    their loggers were given a level of their own.

    Raises:
        Refusal: no such protocol, or its library is missing.
    """
    for name in _WIRE_LOGS:
        if (logger := logging.getLogger(name)).level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    try:
        return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **settings)
    except ValueError as error:
        raise Refusal(f"{url}: unknown protocol {protocol}://; known: {known_protocols()}") from error
    except ImportError as error:
        raise Refusal(f"{url}: {protocol}:// needs a library that is not installed: {error}") from error


def _request_bytes(ranges: Sequence[tuple[int, int]]) -> int:
    """A range is cut only where THREADS would otherwise have too little to do: its pieces are copied to be joined."""
    wanted = sum(end - start for start, end in ranges)
    return min(max(REQUEST_BYTES, -(-wanted // THREADS)), LONGEST_REQUEST_BYTES)


def parallel(call: Callable[[S], T], items: Sequence[S], threads: int = THREADS) -> Sequence[T]:
    """`call` of every item, `threads` at a time, results in order; an error cancels what has not begun."""
    if len(items) <= 1:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return [*pool.map(call, items)]


def _info(path: str, found: Mapping[str, Any]) -> ObjectInfo:
    names = ("ETag", "etag", "generation", "blob_id", "sha256", "md5Hash")
    tag = next((str(found[name]) for name in names if found.get(name)), "")
    if not tag:
        times = (found.get(name) for name in ("mtime", "LastModified", "last_modified", "created"))
        tag = f"{found['size']}-{next((time for time in times if time), '')}"
    return ObjectInfo(path, int(found["size"]), tag.strip('"'))
