"""Where bytes are committed: every object of a result is put once, adopted when equal, refused when not.

Protocol (DESIGN: rules, precisions): the planned name is put if absent; if it is there already, its sha256
decides. MANIFEST.json is put last and alone says that a merge is complete.

    <merge>/ray_merge/recipe.yaml      first, put twice: the second put must be refused (the probe)
    <merge>/model-0000i-of-0000N.safetensors, adapter/..., heads/...
    <merge>/ray_merge/receipts/*.json  after the object that they prove
    <merge>/<side files>, model.safetensors.index.json, config.json
    <merge>/ray_merge/timeline.parquet before the manifest, which does not name it: times differ, whoever is first wins
    <merge>/ray_merge/MANIFEST.json    last

`gc` beside a run. Whoever removes an unfinished merge and whoever finishes it do these steps in this order, each
one a request that happens or does not:

    run  1 put recipe.yaml, see no mark   2 objects, receipts   3 see recipe.yaml and no mark, else put it back and fail
         4 put MANIFEST.json              5 list: recipe.yaml, no mark, every file of the manifest, else fail
    gc   a list: old, no manifest         b put the mark (`removing`)   c remove recipe.yaml
         d list: a manifest? then put recipe.yaml back, remove the mark, stop
         e remove everything else         f remove the mark

Either the manifest is there when gc lists (4 before d): then gc removes no result. Or it comes later (d before 4): then
5 comes after b and c, and sees that recipe.yaml is missing, or the mark, or - when another run has put recipe.yaml
again and f is done - which files e took and that run has not yet made again. So no run ends well over files that are
gone. It may fail at 5 although gc stops at d; the next run finds the merge complete.
A request may be on its way for minutes, so a manifest can land after f, over nothing: readers therefore take a
manifest for a proof only with recipe.yaml, without a mark and with its files (`broken`), and the next run makes the
merge again under it. A gc that is killed leaves its mark, which the next one obeys. One gc at a time: a second one in
the same minute could take the first one's mark away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from ray_merge.errors import OutputConflict, ShardConflict, StoreUnfit
from ray_merge.spec import Receipt, SiteReport
from ray_merge.storage.digest import is_sha256
from ray_merge.storage.store import Store

RECIPE = "ray_merge/recipe.yaml"
MANIFEST = "ray_merge/MANIFEST.json"
REMOVING = "ray_merge/removing"
"""There while `ray-merge gc` removes a merge's folder: put before its recipe goes, removed last."""

RECEIPTS = "ray_merge/receipts"
SITES = "ray_merge/sites.parquet"
TIMELINE = "ray_merge/timeline.parquet"
"""What receipts tell of time, as one table; no manifest names it, because it differs between runs."""

EVALUATION = "ray_merge/evaluation.json"
"""Of an output, beside its merges."""

STATE_FOLDER = ".ray_merge"
"""Scratch and state beside the merges of an output; it never counts as "holds something else"."""

FITNESS = f"{STATE_FOLDER}/put-once"
"""What `check_fit` puts, into an output."""

HASH_CHUNK_BYTES = 16 * 2**20


def pretty_json(value: Any) -> bytes:
    """JSON for files that people read: sorted, indented, deterministic."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def commit(store: Store, path: str, source: bytes | Path, *, sha256: str, merge_id: str) -> bool:
    """Publish one object under its final name.

    Args:
        store: the merge's folder.
        path: final name inside it.
        source: the bytes, or a complete scratch file.
        sha256: of the source, 64 hex digits.
        merge_id: stored with the object where the store can.

    Returns:
        True when the object was there already with the same bytes and was adopted.

    Raises:
        ShardConflict: it is there with other bytes.
    """
    if store.put_if_absent(path, source, {"sha256": sha256, "merge-id": merge_id}):
        return False
    stored = store.metadata(path)
    there = stored.get("sha256") or hash_object(store, path)
    if there != sha256:
        other = f"sha256 {there[:12]} of merge {stored.get('merge-id', 'unknown')[:12]}"
        raise ShardConflict(f"{store.url}/{path}", other, f"sha256 {sha256[:12]} of merge {merge_id[:12]}")
    return True


def commit_bytes(store: Store, path: str, data: bytes, merge_id: str) -> bool:
    """`commit` for bytes in memory."""
    return commit(store, path, data, sha256=hashlib.sha256(data).hexdigest(), merge_id=merge_id)


def hash_object(store: Store, path: str) -> str:
    """sha256 of an object's bytes, read in chunks."""
    info = store.info(path)
    result = hashlib.sha256()
    for start in range(0, info.n_bytes if info else 0, HASH_CHUNK_BYTES):
        result.update(store.read(path, start, min(start + HASH_CHUNK_BYTES, info.n_bytes if info else 0)))
    return result.hexdigest()


def probe(store: Store, recipe: bytes, merge_id: str) -> bool:
    """Put the merge's recipe twice: a store that takes the second put cannot publish exactly once.

    The object names the merge id on its first line, so a folder tells whose it is before any shard is there.

    Returns:
        True when it was not there before.

    Raises:
        OutputConflict: the folder belongs to a merge with another id, or is being removed.
        StoreUnfit: the second put was not refused.
    """
    metadata = {"sha256": hashlib.sha256(recipe).hexdigest(), "merge-id": merge_id}
    if store.put_if_absent(RECIPE, recipe, metadata):
        if store.put_if_absent(RECIPE, recipe, metadata):
            raise StoreUnfit(store.url, "a second put of the same name was accepted")
        refuse_removal(store)
        return True
    owner = recorded_id(store)
    refuse_removal(store)
    if owner != merge_id:
        raise OutputConflict(
            f"{store.url} belongs to merge id {owner}, this is {merge_id}; choose another output, or put {{id}} into it"
        )
    return False


def refuse_removal(store: Store) -> None:
    """Keep out of a folder that `gc` removes, or was removing when it was killed.

    Raises:
        OutputConflict: its mark is there.
    """
    if store.info(REMOVING) is not None:
        raise OutputConflict(
            f"{store.url} is being removed by `ray-merge gc`; run gc --remove to its end, then this again"
        )


def check_fit(store: Store) -> None:
    """See that an output can publish exactly once, before hours are spent on what goes there.

    Args:
        store: the output that holds merges; it keeps one small object of its state afterwards, whoever checks it.

    Raises:
        StoreUnfit: the second put of one name was not refused.
    """
    if store.put_if_absent(FITNESS, b"put once\n", {}) and store.put_if_absent(FITNESS, b"put once\n", {}):
        raise StoreUnfit(store.url, "a second put of the same name was accepted")


def id_line(merge_id: str) -> str:
    """First line of a merge's recipe.yaml."""
    return f"# merge id: {merge_id}\n"


def recorded_id(store: Store) -> str | None:
    """The merge id on the first line of a folder's recipe.yaml; None when there is no such file."""
    if store.info(RECIPE) is None:
        return None
    first = store.read(RECIPE).split(b"\n", 1)[0].decode("utf-8", "replace")
    return first.removeprefix("# merge id: ").strip()


def receipt_path(name: str) -> str:
    """Where the receipt of object `name` lies."""
    return f"{RECEIPTS}/{name.replace('/', '--')}.json"


def put_receipt(store: Store, receipt: Receipt) -> Receipt:
    """Write a receipt, or return the one that is there already (another driver was first).

    Raises:
        ShardConflict: the one that is there proves other bytes: a later run would trust it.
    """
    path = receipt_path(receipt.name)
    if store.put_if_absent(path, pretty_json(asdict(receipt)), {"merge-id": receipt.merge_id}):
        return receipt
    there = read_receipt(store, path)
    if there is None or (there.merge_id, there.sha256) != (receipt.merge_id, receipt.sha256):
        found = (
            f"sha256 {there.sha256[:12]} of merge {there.merge_id[:12]}" if there else "no readable receipt"
        )
        ours = f"sha256 {receipt.sha256[:12]} of merge {receipt.merge_id[:12]}"
        raise ShardConflict(f"{store.url}/{path}", found, ours)
    return there


def read_receipt(store: Store, path: str) -> Receipt | None:
    """A receipt from its JSON; None where it is damaged or of another version of this package.

    What it proves has been looked at; times and bytes read may be anything, see `drive.unit_time`.
    """
    try:
        document: dict[str, Any] = json.loads(store.read(path))
        sites = tuple(SiteReport(**site) for site in document.pop("sites"))
        receipt = Receipt(sites=sites, **document)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    texts = (receipt.name, receipt.merge_id, receipt.sha256)
    whole = all(type(text) is str for text in texts) and type(receipt.n_bytes) is int
    return receipt if whole and is_sha256(receipt.sha256) else None


def sizes_of(store: Store) -> dict[str, int]:
    """Path -> bytes of every object in a folder, by one listing."""
    return {info.path: info.n_bytes for info in store.list()}


def read_receipts(
    store: Store, merge_id: str, objects: Mapping[str, int] | None = None
) -> dict[str, Receipt]:
    """Receipts of one merge by object name; those whose object is missing or of another size do not count.

    Damaged ones do not count either: the object is made again, and its name decides.

    Args:
        store: the merge's folder.
        merge_id: whose receipts.
        objects: of the folder, where it was listed already.
    """
    objects = sizes_of(store) if objects is None else objects
    receipts = {}
    for path in objects:
        if path.startswith(f"{RECEIPTS}/") and path.endswith(".json"):
            receipt = read_receipt(store, path)
            if receipt is None or receipt_path(receipt.name) != path:
                continue
            if receipt.merge_id == merge_id and objects.get(receipt.name) == receipt.n_bytes:
                receipts[receipt.name] = receipt
    return receipts


def has_receipts(store: Store, merge_id: str, objects: Mapping[str, int]) -> bool:
    """Whether a run of this merge was here, be the objects of its receipts gone or not.

    Args:
        store: the merge's folder.
        merge_id: whose receipts.
        objects: of the folder, as listed.
    """
    paths = (path for path in objects if path.startswith(f"{RECEIPTS}/") and path.endswith(".json"))
    receipts = (read_receipt(store, path) for path in paths)
    return any(receipt is not None and receipt.merge_id == merge_id for receipt in receipts)


def read_manifest(store: Store) -> Mapping[str, Any] | None:
    """The manifest of a complete merge; None when there is none.

    Raises:
        OutputConflict: what is there is not a manifest.
    """
    info = store.info(MANIFEST)
    if info is None:
        return None
    try:
        document = json.loads(store.read(MANIFEST, 0, info.n_bytes))
    except (ValueError, RecursionError) as error:
        raise OutputConflict(
            f"{store.url}/{MANIFEST} is not valid JSON ({error}); remove this merge"
        ) from error
    if not _is_manifest(document):
        raise OutputConflict(
            f"{store.url}/{MANIFEST} is no manifest of a merge; remove it or choose another output"
        )
    manifest: Mapping[str, Any] = document
    return manifest


def _is_manifest(document: object) -> bool:
    if not isinstance(document, dict) or not isinstance(document.get("inputs"), dict):
        return False
    files = document.get("files", [])
    return isinstance(files, list) and all(
        isinstance(file, dict) and isinstance(file.get("name"), str) and isinstance(file.get("bytes"), int)
        for file in files
    )


def gone(manifest: Mapping[str, Any], objects: Mapping[str, int], *, sizes: bool = False) -> list[str]:
    """What a manifest stands for and a listing does not show: its files and recipe.yaml; `sizes` must fit too."""
    files = {RECIPE: None, **{file["name"]: file["bytes"] for file in manifest.get("files", ())}}
    return [
        name
        for name, n_bytes in files.items()
        if name not in objects or (sizes and n_bytes not in {None, objects[name]})
    ]


def broken(
    store: Store, manifest: Mapping[str, Any], objects: Mapping[str, int], *, sizes: bool = False
) -> list[str]:
    """Why a manifest proves nothing, in words, the first few of what is gone; empty where the merge is complete.

    Args:
        store: the merge's folder.
        manifest: that lies in it.
        objects: of the folder, as listed. What it lacks is asked for by name: a proxy's listing may be an old one.
        sizes: whether a file of another length counts as gone. Not for readers: people edit README.md.
    """
    marked = REMOVING in objects and store.info(REMOVING) is not None
    asked = ((name, store.info(name)) for name in gone(manifest, objects, sizes=sizes))
    lacking = (
        name
        for name, info in asked
        if info is None or name in gone(manifest, {name: info.n_bytes}, sizes=sizes)
    )
    return [f"{REMOVING} is there"] * marked + [f"{name} is not there" for name in islice(lacking, 3)]


def read_complete(store: Store) -> Mapping[str, Any] | None:
    """The manifest of a merge that is complete, with all that it names; None when it is not.

    Raises:
        OutputConflict: what is there is not a manifest.
    """
    manifest = read_manifest(store)
    return None if manifest is None or broken(store, manifest, sizes_of(store)) else manifest
