"""The recipes of a folder, and what each of them still has to make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ray_merge import api
from ray_merge.drive.outputs import Target
from ray_merge.drive.targets import complete_before, incomplete
from ray_merge.errors import RayMergeError, Refusal
from ray_merge.storage.store import Store, Stores, open_store

SUFFIXES = (".yaml", ".yml")

State = Literal["complete", "skipped", "failed", "refused", "not reached"]
"""Of a merge or a recipe. complete: made this night; skipped: it was complete before."""


@dataclass(slots=True, kw_only=True)
class MergeEntry:
    """One merge: its state, where it lies, and the day that `{date}` stands for there."""

    name: str
    id: str
    url: str
    date: str
    state: State


@dataclass(slots=True, kw_only=True)
class Entry:
    """One recipe.

    Args:
        recipe: its file, by URL.
        state: of all of it.
        why: it was refused or failed, in one sentence.
        base: its base model.
        merges: in recipe order; empty where it was refused before they were known.
        seconds: wall, of its run.
        unit_seconds: of all workers together: what it cost.
        units: that ran.
        written_bytes: of shards and adapters.
        read_bytes: of the base.
        targets: of the merges that have to be made, with the receipts that were there before.
    """

    recipe: str
    state: State = "not reached"
    why: str = ""
    base: str = ""
    merges: list[MergeEntry] = field(default_factory=list)
    seconds: float = 0.0
    unit_seconds: float = 0.0
    units: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    targets: list[Target] = field(default_factory=list)

    def settle(self, stores: Stores) -> None:
        """See which of the merges that had to be made are complete now."""
        left = {target.url for target in incomplete(self.targets, stores)}
        for merge in self.to_do:
            merge.state = self.state if merge.url in left else "complete"

    def words(self) -> str:
        """What there is to make, for people."""
        if self.why:
            return f"{self.recipe}: {self.state}: {self.why}"
        if not self.targets:
            return f"{self.recipe}: all {len(self.merges)} merge(s) are complete"
        return f"{self.recipe}: {len(self.targets)} of {len(self.merges)} merge(s) to make"

    @property
    def to_do(self) -> list[MergeEntry]:
        """Merges that were not complete before."""
        return [merge for merge in self.merges if merge.state != "skipped"]


def recipe_urls(recipes: str) -> list[str]:
    """The recipe files right in a folder, by name; a file is itself.

    Raises:
        Refusal: there is none.
    """
    if recipes.endswith(SUFFIXES):
        return [recipes]
    store = open_store(recipes)
    names = _names(store)
    if not names:
        raise Refusal(f"--recipes {store.url}: no file there ends in {' or '.join(SUFFIXES)}")
    return [f"{store.url}/{name}" for name in names]


def _names(store: Store) -> list[str]:
    # A local folder is not walked: results may lie below it, and a ConfigMap's files are links into hidden folders.
    if store.local_root is not None:
        found = [path.name for path in _files(store.local_root)]
    else:
        found = [info.path for info in store.list() if "/" not in info.path]
    return sorted(name for name in found if name.endswith(SUFFIXES))


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise Refusal(f"--recipes {folder}: {error.strerror}") from error


def look_at(
    url: str, date: str, output: str | None, cache: Path | None, known: Mapping[str, str], stores: Stores
) -> Entry:
    """What one recipe has to make; a recipe that cannot be run is an entry that says why.

    Args:
        url: of the recipe.
        date: of this night.
        output: in place of the recipe's own.
        cache: node-local folder.
        known: merge id -> earlier day under which a summary says that it is complete.
        stores: opens them.
    """
    try:
        plan, targets = api.outlook(url, output=output, date=date, cache_dir=cache)
        entry = Entry(recipe=url, base=plan.base.url, state="skipped")
        for merge, target in zip(plan.merges, targets, strict=True):
            one = MergeEntry(name=merge.name, id=target.merge_id, url=target.url, date=date, state="skipped")
            entry.merges.append(one)
            if target.complete:
                continue
            template, day = plan.recipe.output, known.get(target.merge_id)
            before = complete_before(template, merge.name, target.merge_id, date, stores, known=day)
            if before is not None:
                one.date, one.url = before
                continue
            one.state = entry.state = "not reached"
            entry.targets.append(target)
    except RayMergeError as error:
        return Entry(recipe=url, state="refused" if isinstance(error, Refusal) else "failed", why=str(error))
    return entry


def by_base(entries: Sequence[Entry]) -> list[Entry]:
    """Those with something to do, recipes of one base one after another: its bytes are warm then."""
    bases = list(dict.fromkeys(entry.base for entry in entries if entry.targets))
    return sorted((entry for entry in entries if entry.targets), key=lambda entry: bases.index(entry.base))
