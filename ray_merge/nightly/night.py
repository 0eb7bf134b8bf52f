"""The loop of a night: look at all recipes, run one after another, write the summary.

A recipe that is refused or fails is noted, and the others go on. SIGTERM ends the night where it is: what is complete
is complete, and the same command makes the rest.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ray_merge import api, logs
from ray_merge.drive.events import Event
from ray_merge.drive.outputs import output_root, today
from ray_merge.drive.unit_time import unit_time
from ray_merge.engines import Engine
from ray_merge.errors import RayMergeError, Refusal, RunFailed
from ray_merge.interrupts import Interrupts
from ray_merge.nightly.entries import Entry, by_base, look_at, recipe_urls
from ray_merge.nightly.summary import Summary, known_days, put_summary
from ray_merge.report.times import units_of
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
    began, date = time.monotonic(), night.day
    night = replace(night, date=date)
    entries = [Entry(recipe=url) for url in recipe_urls(night.recipes)]
    with Interrupts() as asked:
        try:
            _work(night, date, entries, asked, say, progress)
        except RunFailed:
            if not asked.name:
                raise
    return put_summary(summary_of(night, entries, began, stopped=asked.name), night.summary_folder)


def summary_of(night: Night, entries: Sequence[Entry], began: float, *, stopped: str) -> Summary:
    """The summary of what was done, not written yet.

    Args:
        night: which.
        entries: of all its recipes.
        began: by `time.monotonic()`.
        stopped: the signal that ended it early, if any.
    """
    seconds = time.monotonic() - began
    started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    return Summary(
        date=night.day,
        recipes=night.recipes,
        started=started.isoformat(timespec="seconds"),
        seconds=seconds,
        stopped=stopped,
        entries=entries,
    )


def look_at_all(night: Night, urls: Iterable[str]) -> Iterator[Entry]:
    """What each recipe has to make."""
    stores, date = Stores(), night.day
    known = known_days(night.summary_folder, date)
    for url in urls:
        yield look_at(url, date, night.output, night.cache, known, stores)


def _work(
    night: Night,
    date: str,
    entries: list[Entry],
    asked: Interrupts,
    say: Callable[[str], None],
    progress: Callable[[Event], None],
) -> None:
    for index, found in enumerate(look_at_all(night, [entry.recipe for entry in entries])):
        if asked.name:
            return
        entries[index] = found
        if not found.targets:
            say(found.words())
    for entry in by_base(entries):
        say(entry.words())
        _run(night, date, entry, asked, progress)
        say(f"{entry.recipe}: {entry.state}{f': {entry.why}' if entry.why else ''}")
        if asked.name:
            return


def _run(night: Night, date: str, entry: Entry, asked: Interrupts, progress: Callable[[Event], None]) -> None:
    """Run one recipe, and note in its entry how that went."""
    began = time.monotonic()
    try:
        result = api.run(
            logs.work_on(entry.recipe),
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
        logs.trace(error)
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
