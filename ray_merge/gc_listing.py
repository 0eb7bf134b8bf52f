"""What `gc` sees: an output as it was listed, and which folders in it are merges, complete or not."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import OutputConflict, RecipeError, Refusal
from ray_merge.recipe.source import MAX_RECIPE_BYTES, parse_yaml
from ray_merge.storage.commit import MANIFEST, RECIPE, REMOVING, gone, id_line, read_manifest
from ray_merge.storage.store import Store, check_path
from ray_merge.storage.sweep import Entry, Sweeper, Upload


@dataclass(frozen=True, slots=True)
class Listing:
    """An output as it was listed.

    Args:
        complete: folders of merges with a manifest that stands for something; "" is the output itself.
        unfinished: folders of other merges -> the output that each lies in.
        youngest: by folder, the age of what changed last below it.
    """

    entries: Sequence[Entry]
    uploads: Sequence[Upload]
    complete: frozenset[str]
    unfinished: Mapping[str, str]
    youngest: Mapping[str, float]


def look(sweeper: Sweeper, store: Store) -> Listing:
    """List an output, and tell the merges in it by their recipes, marks and manifests."""
    entries, uploads = sweeper.entries(), sweeper.uploads()
    paths = {entry.path: entry for entry in entries}
    # A link in the place of the folder `ray_merge` may lead to a manifest.
    proven = _folders(paths, MANIFEST) | _folders(paths, MANIFEST.partition("/")[0])
    broken = {folder for folder in proven if is_broken(folder, paths, store)}
    complete = proven - broken
    unfinished = {}
    for folder in sorted((_folders(paths, RECIPE) | _folders(paths, REMOVING) | broken) - complete):
        if text := sign_of(folder, store):
            unfinished[folder] = _output_of(folder, text)
    return Listing(entries, uploads, frozenset(complete), unfinished, _youngest(entries, uploads))


def is_broken(folder: str, paths: Mapping[str, Entry], store: Store) -> bool:
    """Whether a manifest came too late, and stands for files that were removed before. By hand removed ones stay."""
    there = {name: at(folder, name) in paths for name in (MANIFEST, RECIPE, REMOVING)}
    if not there[MANIFEST] or (there[RECIPE] and not there[REMOVING]):
        return False
    below = {path.removeprefix(at(folder, "")): entry.n_bytes for path, entry in paths.items()}
    return bool(gone(_manifest(folder, store), {**below, RECIPE: 0}))


def _manifest(folder: str, store: Store) -> Mapping[str, Any]:
    """Empty where there is none that can be judged."""
    if not _is_readable(at(folder, MANIFEST), store):
        return {}
    try:
        return read_manifest(store.sub(folder) if folder else store) or {}
    except OutputConflict:
        return {}


def _is_readable(path: str, store: Store) -> bool:
    """Whether a name has no parts that paths have not, and is no link, which may lead anywhere."""
    try:
        check_path(path, store.url)
    except Refusal:
        return False
    return store.local_root is None or not os.path.islink(store.local_root / path)


def _folders(paths: Iterable[str], name: str) -> set[str]:
    return {path.removesuffix(name).rstrip("/") for path in paths if f"/{path}".endswith(f"/{name}")}


def folders_above(path: str) -> Iterator[str]:
    """The folders around `path`, innermost first, "" last."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def at(folder: str, name: str) -> str:
    """The path of `name` in a folder; "" is the output itself."""
    return f"{folder}/{name}" if folder else name


def sign_of(folder: str, store: Store) -> str:
    """What tells whose folder it is: a recipe, a mark, or a manifest that stands alone; "" for none."""
    texts = (text_of(at(folder, name), store) for name in (RECIPE, REMOVING))
    text = next((text for text in texts if text.startswith(id_line("").rstrip())), "")
    merge_id = "" if text else str(_manifest(folder, store).get("id"))
    return id_line(merge_id) if re.fullmatch("[0-9a-f]{64}", merge_id) else text


def text_of(path: str, store: Store) -> str:
    """A recipe or a mark; "" where it is none, too long for one, or a link."""
    info = store.info(path) if _is_readable(path, store) else None
    if info is None or info.n_bytes > MAX_RECIPE_BYTES:
        return ""
    return store.read(path, 0, info.n_bytes).decode("utf-8", "replace")


def _output_of(folder: str, recipe: str) -> str:
    """A merge's folder without its name, which is `scale` or `scale/lambda=0.2`; the widest where that is unknown."""
    try:
        name = str(parse_yaml(recipe, RECIPE).value["merges"][0]["name"])
    except (RecipeError, TypeError, LookupError):
        return ""
    return next((root for root in folders_above(folder) if f"{folder}/".startswith(f"{at(root, name)}/")), "")


def _youngest(entries: Sequence[Entry], uploads: Sequence[Upload]) -> dict[str, float]:
    ages: dict[str, float] = {}
    changed = [(one.path, one.age_seconds) for one in entries] + [
        (one.path, one.age_seconds) for one in uploads
    ]
    for path, age in changed:
        if not is_mark(path):
            for folder in folders_above(path):
                ages[folder] = min(age, ages.get(folder, math.inf))
    return ages


def is_mark(path: str) -> bool:
    """Whether it is what a gc puts, which is no sign of a run."""
    return f"/{path}".endswith(f"/{REMOVING}")


def marked_by(path: str) -> str:
    """The folder that a mark stands in."""
    return path.removesuffix(REMOVING).rstrip("/")
