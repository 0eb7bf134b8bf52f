"""The loop of a night: look at all recipes, run one after another, write the summary.

A recipe that is refused or fails is noted, and the others go on. SIGTERM ends the night where it is: what is complete
is complete, and the same command makes the rest.
"""

from __future__ import annotations

import datetime
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ray_merge import api
from ray_merge.drive.events import Event
from ray_merge.drive.outputs import output_root, today
from ray_merge.engines import Engine
from ray_merge.errors import RayMergeError, Refusal, RunFailed
from ray_merge.interrupts import Interrupts
from ray_merge.nightly.entries import Entry, by_base, look_at, recipe_urls
from ray_merge.nightly.summary import Summary, known_days, put_summary
from ray_merge.report.times import unit_time, units_of
from ray_merge.storage.commit import read_receipts
from ray_merge.storage.store import Stores


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """What to run, and how.

    Args:
        recipes: folder of recipes, or one of them, by URL.
        date: UTC day, for `{date}` in outputs; today by default.
        output: in place of every recipe's own.
        summary: folder for the summary; default: `summaries` in the folder of recipes.
        engine: "ray", or "local" for everything in this process.
        address: of Ray.
        workers: how many; by default one per CPU.
        memory: ceiling per worker.
        device: of the workers.
        cache: node-local folder.
    """

    recipes: str
    date: str | None = None
    output: str | None = None
    summary: str | None = None
    engine: Engine = "ray"
    address: str = "auto"
    workers: int | None = None
    memory: str | None = None
    device: str = "cpu"
    cache: Path | None = None

    @property
    def day(self) -> str:
        """The date.

        Raises:
            Refusal: it is none.
        """
        day = self.date or today()
        output_root("", "", day)
        try:
            datetime.date.fromisoformat(day)
        except ValueError as error:
            raise Refusal(f"--date {day}: {error}") from error
        return day

    @property
    def summary_folder(self) -> str:
        """Where the summary goes."""
        if self.summary is not None:
            return self.summary
        single = self.recipes.endswith((".yaml", ".yml"))
        folder = self.recipes.rpartition("/")[0] or "." if single else self.recipes.rstrip("/")
        return f"{folder}/summaries"


def run_night(
    night: Night,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[Event], None] = lambda _: None,
) -> Summary:
    """Run what is not complete.

    Args:
        night: what and how.
        say: what happens to each recipe.
        progress: called with every event of a run.

    Returns:
        The summary, which is written already.

    Raises:
        Refusal: there is no recipe, or no such day.
        RunFailed: the summary could not be written.
    """
    began, started, date = time.monotonic(), datetime.datetime.now(datetime.UTC), night.day
    urls = recipe_urls(night.recipes)
    entries = [Entry(recipe=url) for url in urls]
    with Interrupts() as asked:
        try:
            _work(night, date, entries, asked, say, progress)
        except RunFailed:
            if not asked.name:
                raise
    summary = Summary(
        date=date,
        recipes=night.recipes,
        started=started.isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
        stopped=asked.name,
        entries=entries,
    )
    return put_summary(summary, night.summary_folder)


def unfinished(night: Night) -> list[str]:
    """What of a night is not complete, in words, as its manifests say.

    Raises:
        Refusal: there is no recipe.
    """
    stores, date, found = Stores(), night.day, []
    known = known_days(night.summary_folder, date)
    for url in recipe_urls(night.recipes):
        entry = look_at(url, date, night.output, night.cache, known, stores)
        if entry.why:
            found.append(f"{url} is {entry.state}: {entry.why}")
        found += [f"{target.url} has no manifest" for target in entry.targets]
    return found


def _work(
    night: Night,
    date: str,
    entries: list[Entry],
    asked: Interrupts,
    say: Callable[[str], None],
    progress: Callable[[Event], None],
) -> None:
    stores = Stores()
    known = known_days(night.summary_folder, date)
    for index, entry in enumerate(entries):
        found = look_at(entry.recipe, date, night.output, night.cache, known, stores)
        if asked.name:
            return
        entries[index] = found
        if found.why:
            say(f"{found.recipe}: {found.state}: {found.why}")
        elif not found.targets:
            say(f"{found.recipe}: all {len(found.merges)} merge(s) are complete")
    for entry in by_base(entries):
        say(f"{entry.recipe}: {len(entry.targets)} of {len(entry.merges)} merge(s) to make")
        _run(night, date, entry, asked, progress)
        say(f"{entry.recipe}: {entry.state}{f': {entry.why}' if entry.why else ''}")
        if asked.name:
            return


def _run(night: Night, date: str, entry: Entry, asked: Interrupts, progress: Callable[[Event], None]) -> None:
    """Run one recipe, and note in its entry how that went."""
    began = time.monotonic()
    try:
        result = api.run(
            entry.recipe,
            output=night.output,
            only=[merge.name for merge in entry.to_do],
            engine=night.engine,
            address=night.address,
            workers=night.workers,
            memory=night.memory,
            device=night.device,
            cache_dir=night.cache,
            date=date,
            progress=progress,
        )
        entry.state, entry.read_bytes = "complete", result.read_bytes
    except RayMergeError as error:
        entry.state = "refused" if isinstance(error, Refusal) and not asked.name else "failed"
        entry.why = str(error)
    except Exception as error:  # noqa: BLE001  (a bug that one recipe meets must not end the night of the others)
        traceback.print_exc()
        entry.state, entry.why = "failed", f"internal error: {type(error).__name__}: {error}"
    entry.seconds = time.monotonic() - began
    _account(entry)


def _account(entry: Entry) -> None:
    """What is complete now, and what this night's units cost; from the store, also after a failure."""
    stores = Stores()
    try:
        entry.settle(stores)
        new = [
            receipt
            for target in entry.targets
            for name, receipt in read_receipts(stores.open(target.url), target.merge_id).items()
            if name not in target.receipts
        ]
    except RayMergeError as error:  # the store that made the run fail
        entry.state, entry.why = "failed", entry.why or str(error)
        for merge in entry.to_do:
            merge.state = "failed"
        return
    units = units_of(one for one in map(unit_time, new) if one is not None)
    entry.units = len(units)
    entry.unit_seconds = sum(one.seconds for one in units)
    entry.written_bytes = sum(receipt.n_bytes for receipt in new)
    entry.read_bytes = entry.read_bytes or sum(one.read for one in units)
    if entry.state == "complete" and any(merge.state != "complete" for merge in entry.to_do):
        entry.state, entry.why = "failed", "its run ended well, but manifests are missing; run it again"
