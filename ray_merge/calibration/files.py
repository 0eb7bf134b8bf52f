"""Which files a task's data are, and what identifies their content.

Owns the file formats by suffix, and how a path names one file, a folder (with all below it) or a glob. Opens no
file; loads neither torch nor pyarrow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import unquote

from ray_merge.errors import DataGone, RecipeError, shown
from ray_merge.recipe import DataSource
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.ordered import in_order
from ray_merge.storage.store import ObjectInfo, Store, Stores, join, redact

FORMATS: Mapping[str, str] = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt", ".csv": "csv",
}  # fmt: skip
"""How a file's name ends -> its format. `.json` means one object per line too."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of rows: where it is, what was seen of it, and its format (a value of FORMATS)."""

    store: Store
    info: ObjectInfo
    format: str

    @property
    def url(self) -> str:
        """For messages."""
        return redact(join(self.store.url, self.info.path))


def find_files(path: str, stores: Stores, where: str) -> tuple[DataFile, ...]:
    """The files that `path` names, sorted by path; hidden files and files of other formats in a folder are left out.

    Args:
        path: a file, a folder or a glob, local or remote.
        stores: opens them.
        where: the recipe's place, for messages.

    Raises:
        RecipeError: there is none, its format is unknown, or a folder mixes formats.
    """
    folder, name = _split(path)
    store = stores.open(folder)
    info = store.info(name) if name else None
    if info is not None:  # before globs: brackets may be part of a name
        return (DataFile(store, info, _format(info.path, f"{where}: {redact(path)}")),)
    found = _matches(path, stores) if re.search(r"[*?\[]", path) else _below(stores.open(path))
    files = tuple(DataFile(s, i, FORMATS[_suffix(i.path)]) for s, i in found if _suffix(i.path) in FORMATS)
    if not files:
        kind = RecipeError if found else DataGone
        raise kind(
            f"{where}: {redact(path)} does not exist or holds no data file ({', '.join(FORMATS)}); give a file, a "
            "folder of files, or a glob such as folder/*.parquet"
        )
    other = next((file for file in files if file.format != files[0].format), None)
    if other is not None:
        raise RecipeError(
            f"{where}: {redact(path)} holds {files[0].format} ({files[0].info.path}) and {other.format} "
            f"({other.info.path}); name one kind by a glob such as folder/*.{files[0].format}"
        )
    return files


def _split(path: str) -> tuple[str, str]:
    """Folder and name of what may be a file; no name where it can be none."""
    protocol, separator, rest = path.partition("://")
    folder, slash, name = (rest if separator else path).rpartition("/")
    if name in {"", ".", ".."} or (separator and not folder):
        return path, ""
    if separator:
        # As the store reads the folder of a file URL.
        return f"{protocol}://{folder}", unquote(name) if protocol == "file" else name
    return folder or slash or ".", name


def _below(store: Store) -> list[tuple[Store, ObjectInfo]]:
    return [(store, info) for info in store.list() if not _hidden(info.path)]


def _matches(path: str, stores: Stores) -> list[tuple[Store, ObjectInfo]]:
    """What a glob matches, part by part as a shell does."""
    protocol, separator, rest = path.partition("://")
    parts = (rest if separator else path).split("/")
    first = next(index for index, part in enumerate(parts) if re.search(r"[*?\[]", part))
    root = "/".join(parts[:first]) or ("/" if first else ".")
    pattern = parts[first:]
    return [
        (store, info)
        for store, info in _below(stores.open(f"{protocol}://{root}" if separator else root))
        if len(names := info.path.split("/")) == len(pattern)
        and all(fnmatchcase(name, part) for name, part in zip(names, pattern, strict=True))
    ]


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _suffix(path: str) -> str:
    name = path.rpartition("/")[2]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def _format(path: str, where: str) -> str:
    suffix = _suffix(path)
    if suffix not in FORMATS:
        ending = f"its name ends in {shown(suffix)}" if suffix else "its name has no ending"
        raise RecipeError(
            f"{where} is no data file that is read here: {ending}, known are {', '.join(FORMATS)}; convert it"
        )
    return FORMATS[suffix]


def data_identity(
    source: DataSource, stores: Stores, digests: DigestCache, *, where: str = "data"
) -> dict[str, Any]:
    """What decides the rows of a task, as plain JSON values: content of local files, store versions of remote ones.

    Names of files are no part of it, so moved data keep their moments.

    Raises:
        RecipeError: the data do not exist.
    """
    files = find_files(source.path, stores, where)
    return {
        "format": files[0].format,
        "files": [*in_order(lambda file: _version(file, digests), files)],
        "text": source.text,
        "limit": source.limit,
    }


def _version(file: DataFile, digests: DigestCache) -> str:
    if file.store.local_root is not None:
        return f"sha256:{digests.sha256(file.store.local_root / file.info.path)}"
    # Asked again, as for adapters: a listing may write a version differently (memory:// does).
    info = file.store.info(file.info.path)
    if info is None:
        raise RecipeError(f"{file.url} disappeared while the run was being planned; plan again")
    return f"{info.version}:{info.n_bytes}"
