"""A store on a local or network-mounted file system.

Owns atomic publishing: a file is written and fsynced under a temporary name, then hard-linked to its final
name. link(2) fails when the name exists, on NFS too, which open(O_EXCL) + write cannot give without a moment
where a half-written file is visible. Keeps no metadata: who needs a digest hashes the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ray_merge.errors import RayMergeError, StoreDenied, StoreError, StoreUnfit
from ray_merge.storage.store import (
    TEMPORARY_PREFIX,
    NotPickled,
    ObjectInfo,
    check_new,
    check_path,
    check_span,
    is_temporary,
    join,
)

T = TypeVar("T")

_NO_LINK = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})
"""What link(2) answers on file systems without hard links (FAT, some FUSE mounts)."""

_GONE = frozenset({errno.ENOENT, errno.ELOOP, errno.ESRCH})
"""A dangling link, or removed since: no object."""

MAX_LISTED = 300_000
"""Files and folders. An output of 1,000 merges in 100 shards each has some 220,000."""

MAX_LINKED = 1000
"""Folders behind links: a link to `/`, or folders that link to each other, would be walked for hours."""

_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG})


class LocalStore(NotPickled):
    """The folder `root`, which need not exist yet. See `store.Store` for what each method promises."""

    def __init__(self, root: Path) -> None:
        self.local_root: Path | None = root
        self.url = str(root)
        self._root = root

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def info(self, path: str) -> ObjectInfo | None:
        """The file at `path`; None when missing, a folder or unfinished."""
        file = self._file(path)

        def stat() -> ObjectInfo | None:
            try:
                found = os.stat(file)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                if error.errno == errno.ELOOP:  # a link to itself leads to nothing, as in `list`
                    return None
                raise
            return _info(path, found) if _is_object(path, found) else None

        return self._guard("looking up", path, stat)

    def list(self, prefix: str = "") -> Sequence[ObjectInfo]:
        """All files under `prefix`, links followed, sorted by path."""
        start = f"{check_path(prefix, self.url)}/" if prefix else ""
        root = self._root / prefix
        found = self._guard("listing", prefix, lambda: [*_walk(root, start, self.url)])
        return sorted(found, key=lambda info: info.path)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start`..`end` of the file."""
        check_span(start, end)
        return self._guard("reading", path, lambda: _read(self._file(path), [(start, end)])[0])

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Each range by its own pread: a disk gains nothing from reading the gaps."""
        for start, end in ranges:
            check_span(start, end)
        return self._guard("reading", path, lambda: _read(self._file(path), ranges))

    def put_if_absent(self, path: str, source: bytes | Path, metadata: Mapping[str, str]) -> bool:
        """Hard-link a finished file, or a temporary copy of `source`, to `path`."""
        check_new(path, metadata, self.url)
        return self._guard("writing", path, lambda: self._put(self._file(path), source))

    def replace(self, path: str, data: bytes) -> None:
        """Rename a finished temporary file to `path`."""
        check_new(path, {}, self.url)
        self._guard("writing", path, lambda: self._replace(self._file(path), data))

    def metadata(self, path: str) -> Mapping[str, str]:
        """Nothing: a plain file has no place for it."""
        if self.info(path) is None:
            raise StoreError(join(self.url, path), "reading", 1, "no such file")
        return {}

    def download(self, path: str, target: Path) -> None:
        """A copy of the file."""
        self._guard("reading", path, lambda: self._copy_out(self._file(path), target))

    def sub(self, path: str) -> LocalStore:
        """The store of the folder `path`."""
        return LocalStore(self._file(path))

    def pinned(self, files: Sequence[ObjectInfo]) -> LocalStore:
        """This store: a disk does not refuse a read of a replaced file."""
        return self

    def _file(self, path: str) -> Path:
        return self._root / check_path(path, self.url)

    def _guard(self, action: str, path: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except RayMergeError:
            raise
        except OSError as error:
            url = join(self.url, path) if path else self.url
            reason = error.strerror or str(error)
            if error.errno in _DENIED:
                raise StoreDenied(url, action, reason) from error
            raise StoreError(url, action, 1, reason) from error

    def _put(self, final: Path, source: bytes | Path) -> bool:
        if os.path.lexists(final):
            return False
        self._make_place(final)
        if isinstance(source, Path):
            with open(source, "rb") as file:
                os.fsync(file.fileno())
            # Another file system, or a file that fs.protected_hardlinks guards: copied below.
            with contextlib.suppress(_CannotLink):
                return _link(source, final)
        with temporary(final) as copy:
            _write(copy, source)
            try:
                return _link(copy, final)
            except _CannotLink as error:
                raise StoreUnfit(self.url, f"its file system has no hard links: {error}") from error

    def _replace(self, final: Path, data: bytes) -> None:
        self._make_place(final)
        with temporary(final) as copy:
            _write(copy, data)
            os.replace(copy, final)
        sync_folder(final.parent)

    def _make_place(self, final: Path) -> None:
        """The folder that `final` lies in."""
        leads = os.path.realpath(final.parent)
        if not f"{leads}/".startswith(f"{os.path.realpath(self._root).rstrip('/')}/"):
            raise StoreDenied(str(final), "writing", f"a link on its way leads out of {self.url}, to {leads}")
        make_folder(final.parent)

    def _copy_out(self, file: Path, target: Path) -> None:
        size = os.stat(file).st_size
        make_folder(target.parent)
        with temporary(target) as copy:
            _write(copy, file)
            if (copied := os.stat(copy).st_size) != size:
                raise StoreError(str(file), "reading", 1, f"copied {copied} of {size} bytes")
            os.replace(copy, target)
        sync_folder(target.parent)


def _read(path: Path, ranges: Sequence[tuple[int, int | None]]) -> list[bytes]:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return [_pread(file.fileno(), path, start, size if end is None else end) for start, end in ranges]


def _pread(descriptor: int, path: Path, start: int, end: int) -> bytes:
    parts: list[bytes] = []
    position = start
    while position < end:
        # Linux returns at most 2 GiB - 4 KiB from one call.
        part = os.pread(descriptor, min(end - position, 1 << 30), position)
        if not part:
            cause = f"it ends at byte {position}, wanted {start}..{end}: truncated or replaced"
            raise StoreError(str(path), "reading", 1, cause)
        parts.append(part)
        position += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _CannotLink(Exception):
    """link(2) does not work from here to there."""


def _link(source: Path, final: Path) -> bool:
    try:
        os.link(source, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in _NO_LINK | {errno.EXDEV, errno.EMLINK, errno.EACCES}:
            raise _CannotLink(error.strerror) from error
        raise
    sync_folder(final.parent)
    return True


def _write(target: Path, source: bytes | Path) -> None:
    with open(target, "xb") as file:
        if isinstance(source, Path):
            with open(source, "rb") as origin:
                shutil.copyfileobj(origin, file, 1 << 20)
        else:
            file.write(source)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def temporary(final: Path) -> Iterator[Path]:
    """A new name beside `final` that no listing shows; whatever is left under it is removed at the end."""
    path = final.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def write_at(target: int, data: bytes, start: int) -> int:
    """Write all of `data` to place `start` of the open file `target`; returns its length.

    Raises:
        OSError: the disk is full. One `pwrite` writes what fits and says so by its count alone, which looks like an
            answer of the store that was cut.
    """
    rest, at = memoryview(data), start
    while rest:
        written = os.pwrite(target, rest, at)
        if not written:  # some file systems in user space answer so, for ever
            raise OSError(errno.ENOSPC, f"nothing was written at byte {at}")
        rest, at = rest[written:], at + written
    return len(data)


def make_folder(folder: Path) -> None:
    """`folder` and its missing parents, each made durable in its own parent."""
    missing = [folder, *folder.parents]
    for parent in reversed(missing[: next(i for i, path in enumerate(missing) if path.exists())]):
        parent.mkdir(exist_ok=True)
        sync_folder(parent.parent)


def sync_folder(folder: Path) -> None:
    """Make new and renamed entries of `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(root: Path, prefix: str, url: str) -> Iterator[ObjectInfo]:
    pending: list[tuple[Path, str, tuple[tuple[int, int], ...], bool]] = [(root, prefix, (), False)]
    n_listed = n_linked = 0
    while pending:
        folder, prefix, above, linked = pending.pop()
        try:
            own = os.stat(folder)
            entries = [*os.scandir(folder)]
        except (FileNotFoundError, NotADirectoryError):
            continue
        identity = (own.st_dev, own.st_ino)
        if identity in above:  # a link to a folder above: already listed there
            continue
        n_listed, n_linked = n_listed + len(entries), n_linked + linked
        if n_listed > MAX_LISTED or n_linked > MAX_LINKED:
            raise StoreDenied(
                url,
                "listing",
                f"more than {MAX_LISTED} files, or {MAX_LINKED} folders behind links, are in it",
            )
        for entry in entries:
            path = f"{prefix}{entry.name}"
            try:
                found = entry.stat()
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise
            if entry.is_dir():
                behind = linked or entry.is_symlink()
                pending.append((folder / entry.name, f"{path}/", (*above, identity), behind))
            elif _is_object(path, found):
                yield _info(path, found)


def _is_object(path: str, found: os.stat_result) -> bool:
    return not is_temporary(path) and (found.st_mode & 0o170000) == 0o100000


def _info(path: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, found.st_size, f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}")
