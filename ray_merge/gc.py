"""`ray-merge gc`: what killed runs left behind in an output and nobody needs, and, on request, its removal.

    temporary   a file under a temporary name; in a complete merge, the mark of a gc that was killed
    attempt     unfinished files of one run, in <output>/.ray_merge/attempts/ (local disks)
    upload      an upload in parts of a run's file that was begun and not completed (S3); its parts cost money and no
                listing shows them
    merge       the folder of a merge that has no manifest, or one that stands for nothing (no recipe.yaml beside it, or
                a gc's mark, and files gone): its shards, receipts and recipe
    state       moments, anchors and steps of learning, which later runs reuse: only when asked for

How it gets along with a run that begins or ends meanwhile: `storage.commit`.

Never removed: a file below a merge that has a manifest; anything that changed within `older_than`, and merges and
state of an output in which anything did, since a run may be at work there (it writes `recipe.yaml` of every merge
when it begins, and the shards of the last one perhaps a day later). Files that no run writes are not looked at, but
for those that somebody put into the folder of an unfinished merge.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ray_merge.errors import Refusal, RunFailed, shown
from ray_merge.gc_listing import (
    Listing,
    at,
    folders_above,
    is_broken,
    is_mark,
    look,
    marked_by,
    sign_of,
    text_of,
)
from ray_merge.storage.commit import (
    MANIFEST,
    RECIPE,
    REMOVING,
    STATE_FOLDER,
)
from ray_merge.storage.store import Store, open_store
from ray_merge.storage.sweep import Entry, Sweeper, Upload, open_sweeper

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_ID = "[0-9a-f]{64}"
_STATE_FOLDER = rf"((?P<root>.*)/)?{re.escape(STATE_FOLDER)}/"
_TEMPORARY = re.compile(r"(.*/)?\.tmp-(\d+-[0-9a-f]{16}|[0-9a-f]{12})")
"""Names that `storage.local` and `work.pickles` make up; files of others that begin so are not ours."""
_ATTEMPT = re.compile(rf"(?P<folder>{_STATE_FOLDER}attempts/[0-9a-f]{{12}})/.+")
_EMPTY = re.compile(rf"(.*/)?{re.escape(STATE_FOLDER)}(/attempts(/[0-9a-f]{{12}})?)?")
"""Folders that runs leave empty."""

_OBJECT = re.compile(
    r"(emr/)?model-[0-9]{5}-of-[0-9]{5}\.safetensors|model-head\.safetensors|(adapter|heads|ray_merge)/.+|emr/rescalers\.json"
)
"""What a run uploads into a merge's folder, as far as it can be long enough for parts."""

_STATE = re.compile(
    rf"(?P<folder>({_STATE_FOLDER})?(moments|anchors|learn))/({_ID}\.safetensors|{_ID}\.json|{_ID}/step-\d{{6}}\.safetensors)"
)
"""In `.ray_merge` of an output, or in a recipe's `store`, which has no such folder."""

Kind = Literal["temporary", "attempt", "upload", "merge", "state"]
_KINDS: tuple[Kind, ...] = ("temporary", "attempt", "upload", "merge", "state")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Something that a run left behind.

    Args:
        kind: see the module's docstring.
        path: of the file, the folder or (uploads) the object that it would have become, relative to the output.
        files: how many; of an upload, its parts.
        n_bytes: of them.
        age_seconds: since the last of them changed, by the store's clock.
        kept: why it must stay; empty where it may go.
        removed: whether this call removed it.
    """

    kind: Kind
    path: str
    files: int
    n_bytes: int
    age_seconds: float
    kept: str = ""
    removed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What `gc` found: `removing` says whether it was asked to remove, each leftover whether it was."""

    url: str
    older_than_seconds: float
    removing: bool
    leftovers: tuple[Leftover, ...]


@dataclass(frozen=True, slots=True)
class _Item:
    """A leftover with what has to be removed for it, and the output that it belongs to where that matters."""

    leftover: Leftover
    entries: tuple[Entry, ...] = ()
    upload: Upload | None = None
    root: str | None = None


def gc(
    output: str, *, remove: bool = False, older_than: str | float = "24h", state: bool = False
) -> Collected:
    """List, and with `remove` delete, what killed runs left in an output.

    Args:
        output: a recipe's output, a folder of several, a store of state, or one merge's folder; local or s3://.
        remove: also delete it.
        older_than: what changed since is left alone; seconds, or such as "90m", "24h", "7d".
        state: also moments, anchors and steps of learning. A later run would have to compute them again.

    Raises:
        Refusal: nothing was removed: no such folder, it lies in a complete merge, a store without removal, no rights.
        RunFailed: the store failed, or refused after something was removed; run it again.
    """
    oldest = parse_age(older_than)
    sweeper, store = open_sweeper(output), open_store(output)
    _refuse_inside(store)
    listing = look(sweeper, store)
    items = sorted(
        (_judged(item, listing, oldest) for item in _sort_out(listing, state)),
        key=lambda item: (_KINDS.index(item.leftover.kind), item.leftover.path),
    )
    if remove:
        items = [*_remove(items, sweeper, store, oldest)]
        sweeper.remove_empty(_EMPTY, oldest)
    return Collected(
        url=sweeper.url,
        older_than_seconds=oldest,
        removing=remove,
        leftovers=tuple(item.leftover for item in items),
    )


def parse_age(text: str | float) -> float:
    """Seconds from "90m", "24h", "7d" or a number of seconds."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", str(text).strip())
    seconds = float(found[1]) * _UNITS[found[2] or "s"] if found else math.nan
    if not math.isfinite(seconds):
        raise Refusal(f"--older-than {shown(text)}: write an age such as 90m, 24h or 7d")
    return seconds


def _refuse_inside(store: Store) -> None:
    """On a disk: S3 has no temporary files, and an upload that is given up takes nothing from a merge."""
    if store.local_root is None:
        return
    real = Path(os.path.realpath(store.local_root))
    for above in [*store.local_root.parents, *real.parents]:
        if os.path.lexists(above / MANIFEST):
            raise Refusal(f"{store.url} lies in the complete merge {above}; give the output that holds it")


def _sort_out(listing: Listing, state: bool) -> Iterator[_Item]:
    groups: dict[tuple[Kind, str, str | None], list[Entry]] = {}
    for entry in listing.entries:
        place = _place(entry.path, listing, state)
        if place is not None:
            groups.setdefault(place, []).append(entry)
    for (kind, path, root), group in groups.items():
        ages = [entry.age_seconds for entry in group if kind == "temporary" or not is_mark(entry.path)]
        left = Leftover(
            kind=kind,
            path=path,
            files=len(group),
            n_bytes=sum(entry.n_bytes for entry in group),
            age_seconds=min(ages, default=math.inf),
        )
        yield _Item(left, tuple(group), root=root)
    for up in (up for up in listing.uploads if _is_ours(up.path, listing)):
        left = Leftover(
            kind="upload", path=up.path, files=up.parts, n_bytes=up.n_bytes, age_seconds=up.age_seconds
        )
        yield _Item(left, upload=up)


def _is_ours(path: str, listing: Listing) -> bool:
    """Whether a run uploads to there; what other programs upload below an output is theirs."""
    if STATE_FOLDER in path.split("/") or _STATE.fullmatch(path):
        return True
    merges = (
        folder for folder in folders_above(path) if folder in listing.complete or folder in listing.unfinished
    )
    return any(_OBJECT.fullmatch(path.removeprefix(at(folder, ""))) for folder in merges)


def _place(path: str, listing: Listing, state: bool) -> tuple[Kind, str, str | None] | None:
    """(kind, path of the leftover, output that must be quiet) of one file; None for what is none of our business."""
    if _TEMPORARY.fullmatch(path):
        return ("temporary", path, None)
    if found := _ATTEMPT.fullmatch(path):
        return ("attempt", found["folder"], None)
    if found := _STATE.fullmatch(path):
        return ("state", found["folder"], found["root"] or "") if state else None
    around = [*folders_above(path)]
    if is_mark(path) and marked_by(path) in listing.complete:
        return ("temporary", path, None)
    if STATE_FOLDER in path.split("/") or any(folder in listing.complete for folder in around):
        return None
    merge = next((folder for folder in around if folder in listing.unfinished), None)
    return None if merge is None else ("merge", merge, listing.unfinished[merge])


def _judged(item: _Item, listing: Listing, oldest: float) -> _Item:
    kept = ""
    if (
        item.upload is None
        and not is_mark(item.leftover.path)
        and any(folder in listing.complete for folder in folders_above(item.leftover.path))
    ):
        kept = "it lies in a complete merge"
    elif item.leftover.age_seconds < oldest:
        kept = "it changed too recently"
    elif item.root is not None and listing.youngest.get(item.root, math.inf) < oldest:
        kept = "its output changed too recently: a run may be at work"
    return replace(item, leftover=replace(item.leftover, kept=kept))


def _remove(items: Sequence[_Item], sweeper: Sweeper, store: Store, oldest: float) -> Iterator[_Item]:
    count = 0
    for item in items:
        if item.leftover.kept:
            yield item
            continue
        try:
            kept = _remove_one(item, sweeper, store, oldest)
        except Refusal as error:
            if count == 0 and item.leftover.kind != "merge":
                raise
            raise RunFailed(f"{error}; {count} leftover(s) were removed before") from error
        count += not kept
        yield replace(item, leftover=replace(item.leftover, kept=kept, removed=not kept))


def _remove_one(item: _Item, sweeper: Sweeper, store: Store, oldest: float) -> str:
    """Remove a leftover; returns why it was kept after all, else nothing."""
    if item.upload is not None:
        sweeper.abort(item.upload)
        return ""
    if item.leftover.kind == "merge":
        return _remove_merge(item, sweeper, store, oldest)
    if is_mark(item.leftover.path):
        folder = marked_by(item.leftover.path)
        if not _is_whole(folder, sweeper, store):
            return "it changed since it was listed: a run is at work"
        _put_back(folder, text_of(item.leftover.path, store), store)
    for entry in item.entries:
        sweeper.remove(entry.path)
    return ""


def _remove_merge(item: _Item, sweeper: Sweeper, store: Store, oldest: float) -> str:
    """Steps a to f of gc in `storage.commit`; returns why the merge was kept after all, else nothing."""
    folder = item.leftover.path
    first, last = at(folder, RECIPE), at(folder, REMOVING)
    young = [e for e in sweeper.entries(folder) if e.age_seconds < oldest and e.path != last]
    if young or _is_whole(folder, sweeper, store):
        return "it changed since it was listed: a run is at work"
    text = sign_of(folder, store)
    own_mark = store.put_if_absent(last, text.encode(), {})
    sweeper.remove(first)
    if _is_whole(folder, sweeper, store):
        _put_back(folder, text, store)
        if own_mark:
            sweeper.remove(last)
        return "a run has completed it"
    for path in [*(entry.path for entry in item.entries if entry.path not in {first, last}), last]:
        sweeper.remove(path)
    return ""


def _is_whole(folder: str, sweeper: Sweeper, store: Store) -> bool:
    """Whether a manifest lies there now whose files do, too, whatever became of recipe.yaml."""
    paths = {entry.path: entry for entry in sweeper.entries(folder)}
    without = {path: entry for path, entry in paths.items() if path != at(folder, RECIPE)}
    return at(folder, MANIFEST) in paths and not is_broken(folder, without, store)


def _put_back(folder: str, recipe: str, store: Store) -> None:
    store.put_if_absent(at(folder, RECIPE), recipe.encode(), {})
