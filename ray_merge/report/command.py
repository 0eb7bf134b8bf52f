"""`ray-merge report`: read what lies below an output, write one file about it. No merge is ever changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_merge.errors import Refusal
from ray_merge.report.page import MARK, page
from ray_merge.report.read import Gathered, gather
from ray_merge.storage.commit import MANIFEST, RECIPE
from ray_merge.storage.store import Store, join, open_store

PATH = "ray_merge/report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A report that was written.

    Args:
        url: of the file.
        n_bytes: its size.
        document: what it says, in short and JSON-able.
    """

    url: str
    n_bytes: int
    document: Mapping[str, Any]


def report(output: str, *, to: str | Path | None = None) -> Reported:
    """Write one HTML file about every merge below `output`; an earlier report there is replaced.

    Args:
        output: a recipe's output, a folder of several, or one merge's folder (then `to` is needed).
        to: path or URL of the file, whose name ends in .html; default: ray_merge/report.html in `output`.

    Raises:
        Refusal: there is neither a merge nor a score, or the file may not go there.
        StoreError: the store fails.
    """
    root = open_store(str(output))
    store, name = _target(root, None if to is None else str(to))
    found = gather(root)
    data = page(found)
    store.replace(name, data)
    return Reported(url=join(store.url, name), n_bytes=len(data), document=_document(found))


def _target(root: Store, to: str | None) -> tuple[Store, str]:
    """Where the file goes: a folder and a name in it.

    Raises:
        Refusal: it would lie in a merge, replace what is no report, or is no HTML file by its name.
    """
    if to is None:
        if root.info(MANIFEST) is not None or root.info(RECIPE) is not None:
            raise Refusal(
                f"{root.url} is a merge, which stays as it is; say where the report goes with --to FILE.html"
            )
        store, name = root, PATH
    else:
        folder, _, name = to.rpartition("/")
        if folder.endswith(":/"):
            raise Refusal(f"--to {to!r} names no bucket or folder")
        if not name.endswith((".html", ".htm")):
            raise Refusal(f"--to {to!r} is no name of an HTML file; let it end in .html")
        store = open_store(folder or ("/" if to.startswith("/") else "."))
        _refuse_inside(store, name)
    if store.info(name) is not None and store.read(name)[: len(MARK)] != MARK:
        raise Refusal(
            f"{store.url}/{name} is there and is no report of ray-merge; choose another name with --to"
        )
    return store, name


def _refuse_inside(store: Store, name: str) -> None:
    """Refuse a place in a merge's folder, or above it in its ray_merge/."""
    parts = store.url.split("/")
    least = 3 if "://" in store.url else 1  # the bucket, or the root of the disk
    for count in range(len(parts), least, -1):
        folder = open_store("/".join(parts[:count]))
        if folder.info(RECIPE) is not None:
            raise Refusal(
                f"{store.url}/{name} lies in the merge {folder.url}, which stays as it is; choose another --to"
            )


def _document(found: Gathered) -> dict[str, Any]:
    """The report in short, for other programs."""
    return {
        "output": found.url,
        "merges": [
            {
                "name": one.folder,
                "id": one.manifest.get("id"),
                "method": one.inputs.get("method"),
                "bytes": one.n_bytes,
                "sites": one.sites.n_sites if one.sites else None,
                "update_norm": one.sites.norm if one.sites else None,
                "worst_lost_share": one.sites.worst[0] if one.sites and one.sites.worst else None,
                "steps": one.curves.n_steps if one.curves else None,
                "problems": list(one.problems),
            }
            for one in found.merges
        ],
        "incomplete": list(found.incomplete),
        "damaged": list(found.damaged),
        "evaluations": sorted(found.evaluations),
        "units": len(found.units),
        "worker_seconds": round(sum(one.seconds for one in found.units), 3),
    }
