"""`ray-merge gc`: what killed runs left behind in an output and nobody needs, and, on request, its removal.

    temporary   a file under a temporary name
    attempt     unfinished files of one run, in <output>/.ray_merge/attempts/ (local disks)
    upload      an upload in parts that was begun and not completed (S3); its parts cost money and no listing shows them
    merge       the folder of a merge that has no manifest: its shards, receipts and recipe
    state       moments, anchors and steps of learning, which later runs reuse: only when asked for

Never removed: a file below a merge that has a manifest; anything that changed within `older_than`, and merges and
state of an output in which anything did, since a run may be at work there (it writes `recipe.yaml` of every merge
when it begins, and the shards of the last one perhaps a day later). Files that no run writes are not looked at, but
for those that somebody put into the folder of an unfinished merge.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ray_merge.errors import RecipeError, Refusal, RunFailed, shown
from ray_merge.recipe.source import MAX_RECIPE_BYTES, parse_yaml
from ray_merge.storage.commit import MANIFEST, RECIPE, REMOVING, STATE_FOLDER, id_line
from ray_merge.storage.store import Store, open_store
from ray_merge.storage.sweep import Entry, Sweeper, Upload, open_sweeper

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_ID = "[0-9a-f]{64}"
_STATE_FOLDER = rf"((?P<root>.*)/)?{re.escape(STATE_FOLDER)}/"
_TEMPORARY = re.compile(r"(.*/)?\.tmp-(\d+-[0-9a-f]{16}|[0-9a-f]{12})")
"""Names that `storage.local` and `work.pickles` make up; files of others that begin so are not ours."""
_ATTEMPT = re.compile(rf"(?P<folder>({_STATE_FOLDER})?attempts/[0-9a-f]{{12}})/.+")
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
    listing = _look(sweeper, store)
    items = sorted(
        (_judged(item, listing, oldest) for item in _sort_out(listing, state)),
        key=lambda item: (_KINDS.index(item.leftover.kind), item.leftover.path),
    )
    if remove:
        items = [*_remove(items, sweeper, store, oldest)]
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


@dataclass(frozen=True, slots=True)
class _Listing:
    """An output as it was listed.

    Args:
        complete: folders of merges with a manifest; "" is the output itself.
        unfinished: folders of merges without one -> the output that each lies in.
        youngest: by folder, the age of what changed last below it.
    """

    entries: Sequence[Entry]
    uploads: Sequence[Upload]
    complete: frozenset[str]
    unfinished: Mapping[str, str]
    youngest: Mapping[str, float]


def _look(sweeper: Sweeper, store: Store) -> _Listing:
    entries, uploads = sweeper.entries(), sweeper.uploads()
    paths = {entry.path: entry for entry in entries}
    # A link in the place of the folder `ray_merge` may lead to a manifest.
    complete = _folders(paths, MANIFEST) | _folders(paths, MANIFEST.partition("/")[0])
    unfinished = {}
    for folder in sorted((_folders(paths, RECIPE) | _folders(paths, REMOVING)) - complete):
        texts = (_read(paths.get(_join(folder, name)), store) for name in (RECIPE, REMOVING))
        text = next((text for text in texts if text.startswith(id_line("").rstrip())), None)
        if text is not None:
            unfinished[folder] = _output_of(folder, text)
    return _Listing(entries, uploads, frozenset(complete), unfinished, _youngest(entries, uploads))


def _folders(paths: Iterable[str], name: str) -> set[str]:
    return {path.removesuffix(name).rstrip("/") for path in paths if f"/{path}".endswith(f"/{name}")}


def _above(path: str) -> Iterator[str]:
    """The folders around `path`, innermost first, "" last."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _read(entry: Entry | None, store: Store) -> str:
    if entry is None or entry.n_bytes > MAX_RECIPE_BYTES or re.search(r"[\x00-\x1f\x7f\\\\]", entry.path):
        return ""
    return "" if store.info(entry.path) is None else store.read(entry.path).decode("utf-8", "replace")


def _output_of(folder: str, recipe: str) -> str:
    """A merge's folder without its name, which is `scale` or `scale/lambda=0.2`; the widest where that is unknown."""
    try:
        name = str(parse_yaml(recipe, RECIPE).value["merges"][0]["name"])
    except (RecipeError, TypeError, LookupError):
        return ""
    return next((above for above in _above(folder) if f"{folder}/".startswith(f"{_join(above, name)}/")), "")


def _youngest(entries: Sequence[Entry], uploads: Sequence[Upload]) -> dict[str, float]:
    ages: dict[str, float] = {}
    changed = [(one.path, one.age_seconds) for one in entries] + [
        (one.path, one.age_seconds) for one in uploads
    ]
    for path, age in changed:
        if not _is_mark(path):
            for folder in _above(path):
                ages[folder] = min(age, ages.get(folder, math.inf))
    return ages


def _is_mark(path: str) -> bool:
    return f"/{path}".endswith(f"/{REMOVING}")  # ours, and no sign of a run


def _sort_out(listing: _Listing, state: bool) -> Iterator[_Item]:
    groups: dict[tuple[Kind, str, str | None], list[Entry]] = {}
    for entry in listing.entries:
        place = _place(entry.path, listing, state)
        if place is not None:
            groups.setdefault(place, []).append(entry)
    for (kind, path, root), group in groups.items():
        ages = [entry.age_seconds for entry in group if not _is_mark(entry.path)]
        left = Leftover(
            kind=kind,
            path=path,
            files=len(group),
            n_bytes=sum(entry.n_bytes for entry in group),
            age_seconds=min(ages, default=math.inf),
        )
        yield _Item(left, tuple(group), root=root)
    for up in listing.uploads:
        left = Leftover(
            kind="upload", path=up.path, files=up.parts, n_bytes=up.n_bytes, age_seconds=up.age_seconds
        )
        yield _Item(left, upload=up)


def _place(path: str, listing: _Listing, state: bool) -> tuple[Kind, str, str | None] | None:
    """(kind, path of the leftover, output that must be quiet) of one file; None for what is none of our business."""
    if _TEMPORARY.fullmatch(path):
        return ("temporary", path, None)
    if found := _ATTEMPT.fullmatch(path):
        return ("attempt", found["folder"], None)
    if found := _STATE.fullmatch(path):
        return ("state", found["folder"], found["root"] or "") if state else None
    around = [*_above(path)]
    if STATE_FOLDER in path.split("/") or any(folder in listing.complete for folder in around):
        return None
    merge = next((folder for folder in around if folder in listing.unfinished), None)
    return None if merge is None else ("merge", merge, listing.unfinished[merge])


def _judged(item: _Item, listing: _Listing, oldest: float) -> _Item:
    kept = ""
    if item.upload is None and any(folder in listing.complete for folder in _above(item.leftover.path)):
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
    paths = [entry.path for entry in item.entries]
    if item.leftover.kind == "merge":
        folder = item.leftover.path
        first, last, manifest = (_join(folder, name) for name in (RECIPE, REMOVING, MANIFEST))
        now = [entry for entry in sweeper.entries(folder) if entry.path != last]
        if any(entry.age_seconds < oldest or entry.path == manifest for entry in now):
            return "it changed since it was listed: a run is at work"
        # A run that begins from here on is refused, and one at work misses its recipe before it puts a manifest; if
        # this process is killed, the mark tells the next `gc` whose folder this is.
        if first in paths:
            store.put_if_absent(last, store.read(first), {})
        paths = [first, *(path for path in paths if path not in {first, last}), last]
    for path in paths:
        sweeper.remove(path)
    return ""
