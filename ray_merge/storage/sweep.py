"""Deleting, kept apart from `store.Store` so that no merge can do it by accident.

Owns the listing that shows everything (unfinished files too) with ages, and the removal of single files and uploads.
Follows no link: a link is an entry like a file, and removing it removes the link. Which entries may go is decided by
`ray_merge.gc`. Local disks are here, S3 is in `s3_sweep`; other stores are refused.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from ray_merge.errors import Refusal, StoreDenied, StoreError
from ray_merge.storage.local import MAX_LISTED, temporary
from ray_merge.storage.store import open_store

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder, `path` relative to it: a file, a link or, on S3, an object.

    `age_seconds` since it was last written, by the store's own clock.
    """

    path: str
    n_bytes: int
    age_seconds: float


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload in parts that was begun and not completed: where it would go, its id, and its parts so far."""

    path: str
    id: str
    parts: int
    n_bytes: int
    age_seconds: float


class Sweeper(Protocol):
    """A folder seen by whoever tidies it. Errors are those of `store.Store`."""

    url: str

    def entries(self, folder: str = "") -> Sequence[Entry]:
        """Everything below `folder` but folders, sorted by path; empty when there is no such folder."""

    def uploads(self) -> Sequence[Upload]:
        """Uploads below the folder that are not complete, sorted by path and id."""

    def remove(self, path: str) -> None:
        """Remove one entry, and on a disk the folders that are empty then; one that is gone already is fine."""

    def remove_empty(self, pattern: re.Pattern[str], older_than: float) -> None:
        """Remove folders whose whole path matches, that are empty and did not change for so many seconds."""

    def abort(self, upload: Upload) -> None:
        """Give up one upload and free its parts; one that is gone already is fine."""


def open_sweeper(url: str) -> Sweeper:
    """The sweeper of the folder `url`.

    Raises:
        Refusal: no such folder, or a store in which nothing can be deleted here.
    """
    store = open_store(url)
    if store.local_root is not None:
        if not store.local_root.is_dir():
            raise Refusal(f"{store.url} is no folder that exists")
        return LocalSweeper(store.local_root)
    if store.url.startswith("s3://"):
        from ray_merge.storage.s3_sweep import open_s3_sweeper  # 0.8 s of imports, as in `open_store`

        return open_s3_sweeper(store.url)
    raise Refusal(f"{store.url}: only local folders and s3:// can be tidied; use the store's own tools")


class LocalSweeper:
    """The folder `root`; `root` itself may be reached by links, nothing below it is."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self._root = root

    def entries(self, folder: str = "") -> Sequence[Entry]:
        """All names but folders."""
        return sorted((e for e, is_folder in self._walked(folder) if not is_folder), key=lambda e: e.path)

    def remove_empty(self, pattern: re.Pattern[str], older_than: float) -> None:
        """The innermost first; a folder that holds something stays."""
        found = [e for e, is_folder in self._walked("") if is_folder and pattern.fullmatch(e.path)]
        for entry in sorted(found, key=lambda e: e.path, reverse=True):
            if entry.age_seconds >= older_than:
                parts = entry.path.split("/")
                self._guard("removing", entry.path, partial(_remove_folder, self._root, parts))

    def uploads(self) -> Sequence[Upload]:
        """None: a disk knows no uploads."""
        return []

    def remove(self, path: str) -> None:
        """Unlink, opening folder by folder: one that was replaced by a link since the listing is not entered."""
        self._guard("removing", path, lambda: _unlink(self._root, path.split("/")))

    def abort(self, upload: Upload) -> None:
        """Never called: there are none."""
        raise AssertionError(f"{self.url} is a disk and has no upload {upload.id}")

    def _walked(self, folder: str) -> list[tuple[Entry, bool]]:
        now = _clock(self._root)
        return self._guard("listing", folder, lambda: [*_walk(self._root, folder, self.url, now)])

    def _guard(self, action: str, path: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except PermissionError as error:
            raise StoreDenied(f"{self.url}/{path}", action, error.strerror or str(error)) from error
        except OSError as error:
            raise StoreError(f"{self.url}/{path}", action, 1, error.strerror or str(error)) from error


def _clock(root: Path) -> float:
    """Now, as the disk's own server counts it: this machine may be a day ahead of it, and all would look abandoned."""
    try:
        with temporary(root / "now") as file, open(file, "xb") as new:
            return os.fstat(new.fileno()).st_mtime
    except OSError:  # whoever may not write here cannot remove anything either
        return time.time()


def _walk(root: Path, folder: str, url: str, now: float) -> Iterator[tuple[Entry, bool]]:
    """Entries, and whether each is a folder."""
    count = 0
    pending = [folder]
    while pending:
        above = pending.pop()
        try:
            with (
                _opened(root, above.split("/") if above else []) as (*_, inside),
                os.scandir(inside) as listed,
            ):
                found = [*listed]
                prefix = f"{above}/" if above else ""
                count += len(found)
                if count > MAX_LISTED:
                    raise StoreDenied(url, "listing", f"more than {MAX_LISTED} files are in it")
                for entry in found:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if is_folder:
                        pending.append(f"{prefix}{entry.name}")
                    with suppress(FileNotFoundError):  # gone since
                        status = entry.stat(follow_symlinks=False)
                        n_bytes = status.st_size if stat.S_ISREG(status.st_mode) else 0
                        age = max(0.0, now - status.st_mtime)
                        yield Entry(f"{prefix}{entry.name}", n_bytes, age), is_folder
        except (FileNotFoundError, NotADirectoryError):
            continue


@contextmanager
def _opened(root: Path, folders: Sequence[str]) -> Iterator[list[int]]:
    """Descriptors of `root` and of the folders below it in turn, none of them a link."""
    with ExitStack() as stack:
        flags = os.O_RDONLY | os.O_DIRECTORY
        descriptors = [os.open(root, flags)]
        stack.callback(os.close, descriptors[0])
        for name in folders:
            descriptors.append(os.open(_plain(name), flags | os.O_NOFOLLOW, dir_fd=descriptors[-1]))
            stack.callback(os.close, descriptors[-1])
        yield descriptors


def _plain(name: str) -> str:
    if name in {"", ".", ".."}:
        raise FileNotFoundError(f"{name!r} names nothing in a folder")
    return name


def _unlink(root: Path, parts: Sequence[str]) -> None:
    *folders, name = parts
    with suppress(FileNotFoundError), _opened(root, folders) as descriptors:
        with suppress(FileNotFoundError):
            os.unlink(_plain(name), dir_fd=descriptors[-1])
        for parent, folder in zip(reversed(descriptors[:-1]), reversed(folders), strict=True):
            try:
                os.rmdir(folder, dir_fd=parent)
            except OSError:  # not empty
                break


def _remove_folder(root: Path, parts: Sequence[str]) -> None:
    *folders, name = parts
    with suppress(OSError), _opened(root, folders) as descriptors:  # not empty, or gone
        os.rmdir(_plain(name), dir_fd=descriptors[-1])
