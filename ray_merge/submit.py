"""One recipe as one Ray job, watched to its end: `jobs/submit.py`.

The name of the job follows from the merges that it makes, where they go, and the night. So the same command attaches
to the job when it runs already, does nothing when its merges are complete, and starts the next attempt (`-2`, `-3`,
...) when the last one failed. How a job ended is read from its state and from the manifests, never from the log's
stream: that one ends for many reasons, with the same quiet close (ray #57002, #60665).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from time import sleep
from typing import Literal

from ray_merge import api, logs
from ray_merge.contact import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, Contact, NoContact
from ray_merge.drive.outputs import Target, today
from ray_merge.drive.targets import incomplete
from ray_merge.errors import ContactLost, Refusal, RunFailed, shown
from ray_merge.identity import digest
from ray_merge.interrupts import Interrupts
from ray_merge.recipe import Recipe, named_urls
from ray_merge.runtime.jobs_api import JobsApi, JobState
from ray_merge.storage.store import Stores

OURS = ("--output", "--only", "--date", "--address", "--engine")
"""Options of `ray-merge run` that are not handed on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is submitted.

    Args:
        recipe: URL, or a path that the cluster's head can read too. What it names are URLs or absolute paths.
        scripts: folder of the job scripts, which travels with the job.
        output: in place of the recipe's own; a path is one of every node too.
        only: names or globs of merges; all of them when empty.
        date: UTC day for `{date}` in `output`, and part of the job's name; today by default.
        options: of `ray-merge run` besides these.
        name: of the job, in place of the one that follows from the recipe.
    """

    recipe: str
    scripts: Path
    output: str | None = None
    only: Sequence[str] = ()
    date: str | None = None
    options: Sequence[str] = ()
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How to wait.

    Args:
        contact_seconds: how long the cluster may stay silent.
        stop_on_interrupt: SIGINT and SIGTERM also stop the job; else it goes on.
        say: what happens to the job.
        log: what the job prints.
    """

    contact_seconds: float
    stop_on_interrupt: bool
    say: Callable[[str], None]
    log: Callable[[str], None]


def submit(request: Request, jobs: JobsApi, patience: Patience) -> None:
    """Submit a recipe or attach to its job, and return when all of its merges are complete.

    Raises:
        Refusal: the recipe was refused, here or by the job, nobody answers at the address, or a job of the given name
            makes other merges.
        RunFailed: the job failed or was stopped, or it ended well and a merge is missing.
        ContactLost: the cluster does not answer any more.
    """
    _check_options(request.options)
    output = None if request.output is None else _absolute(request.output)
    request = replace(request, recipe=_absolute(request.recipe), output=output)
    date = request.date or today()
    plan, targets = api.outlook(request.recipe, output=request.output, only=request.only, date=date)
    _refuse_relative(request.recipe, plan.recipe)
    if all(target.complete for target in targets):
        patience.say(f"nothing to do: all {len(targets)} merge(s) are complete")
        return
    contact = Contact(server=jobs.address, seconds=patience.contact_seconds, say=patience.say)
    with Interrupts() as asked:
        name = ""
        try:
            name, how = _begin(request, targets, date, jobs, contact)
            patience.say(f"{how} job {name} at {jobs.address}")
            state = _watch(name, jobs, contact, patience.log, asked.obey)
        except Exception as error:
            if not asked.name:
                raise
            raise RunFailed(_after_interrupt(asked.name, name, jobs, patience)) from error
    _judge(name, state)
    missing = incomplete(targets, Stores())
    if missing:
        advice = "submit the recipe again"
        if "://" not in missing[0].url:
            advice += ", or to a URL if the cluster's nodes do not share this machine's disk"
        raise RunFailed(
            f"job {name} succeeded, but {len(missing)} of {len(targets)} merge(s) have no manifest, first "
            f"{missing[0].url}; {advice}"
        )
    patience.say(f"complete: all {len(targets)} merge(s) of {request.recipe}")


def _check_options(options: Sequence[str]) -> None:
    """What decides where merges go must be known here too: their manifests are the proof."""
    for word in options:
        if word.split("=")[0] in OURS:
            raise Refusal(f"{word}: give it before the --, since this program must know it too")


def _refuse_relative(recipe: str, parsed: Recipe) -> None:
    """A job's working directory is a folder of its own, which the cluster throws away after it."""
    for what, url in named_urls(parsed):
        if "://" not in url and not os.path.isabs(url):
            raise Refusal(
                f"{recipe}: {what} is {url}, a path relative to a folder that the job does not have; give a URL such "
                "as s3://bucket/name, or an absolute path where the cluster's nodes share that disk"
            )


def _begin(
    request: Request, targets: Sequence[Target], date: str, jobs: JobsApi, contact: Contact
) -> tuple[str, Literal["submitted", "attached to"]]:
    """Attach to the job of these merges, or start its next attempt; returns the name that it has.

    Names are stable per recipe and night: the same merges in the same places have the same name.
    """
    if request.name is not None and not re.fullmatch(r"[A-Za-z0-9._-]+", request.name):
        raise Refusal(f"--submission-id {shown(request.name)}: use letters, digits, '.', '_' and '-' only")
    made = digest([[target.url, target.merge_id] for target in targets])[:12]
    wanted = request.name or f"ray-merge-{made}-{date}"
    for attempt in count(1):
        name = wanted if attempt == 1 else f"{wanted}-{attempt}"
        state = _first_contact(name, jobs, contact) if attempt == 1 else contact(_asking(jobs, name))
        if state is None:
            if contact(_starting(request, name, date, made, jobs)):
                return name, "submitted"
            state = _known(name, jobs, contact)
        elif state.ended:
            contact.say(f"job {name} is over ({state.status}), and not all of these merges are complete")
            continue
        if request.name is not None:
            _refuse_other_merges(name, state, request.recipe, made)
        return name, "attached to"
    raise AssertionError("count() does not end")


def _refuse_other_merges(name: str, state: JobState, recipe: str, made: str) -> None:
    theirs = state.metadata.get("merges")
    if theirs != made:
        known = f"merges {theirs} of {state.metadata.get('recipe')}" if theirs else "something else"
        raise Refusal(
            f"--submission-id {name}: a job of that name makes {known}, not merges {made} of {recipe}; give another "
            "one, or none: then the name follows from the merges"
        )


def _first_contact(name: str, jobs: JobsApi, contact: Contact) -> JobState | None:
    try:
        return contact(_asking(jobs, name))
    except ContactLost as error:
        raise Refusal(
            f"{error}; this call has submitted nothing: check that the head runs, and --address"
        ) from error


def _asking(jobs: JobsApi, name: str) -> Callable[[], JobState | None]:
    return lambda: jobs.state(name)


def _starting(request: Request, name: str, date: str, made: str, jobs: JobsApi) -> Callable[[], bool]:
    words = ["python", "merge.py", request.recipe, "--date", date]
    words += [] if request.output is None else ["--output", request.output]
    for pattern in request.only:
        words += ["--only", pattern]
    command = shlex.join([*words, *request.options])
    metadata = {"recipe": request.recipe, "date": date, "merges": made}
    # Asked again after a silence, the cluster may have it already: then it is attached to.
    return lambda: jobs.submit(name, command, request.scripts, metadata)


def _absolute(place: str) -> str:
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


class _Log:
    """Prints a log once, however often its stream begins again, which it does at the log's beginning."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.printed = 0
        self._seen = 0

    def begin(self) -> None:
        """Another stream."""
        self._seen = 0

    def add(self, text: str) -> None:
        """What the stream says next."""
        new = text[max(0, self.printed - self._seen) :]
        self._seen += len(text)
        self.printed = max(self.printed, self._seen)
        if new:
            self.write(new)


def _watch(
    name: str, jobs: JobsApi, contact: Contact, write: Callable[[str], None], obey: Callable[[], None]
) -> JobState:
    """Print a job's log until the job has ended; whenever the stream ends, the job is asked, and followed again.

    `obey` raises what asks this process to stop.
    """
    log, wait = _Log(write), FIRST_WAIT_SECONDS
    while True:
        before = log.printed
        with suppress(NoContact):
            _follow(name, jobs, contact, log, obey)
        obey()
        state = _known(name, jobs, contact)
        if state.ended:
            with suppress(NoContact, Refusal):
                log.begin()
                log.add(jobs.log(name))
            return state
        wait = FIRST_WAIT_SECONDS if log.printed > before else min(2 * wait, LONGEST_WAIT_SECONDS)
        sleep(wait)


def _follow(name: str, jobs: JobsApi, contact: Contact, log: _Log, obey: Callable[[], None]) -> None:
    """Until the stream ends, or is silent and its job has ended: a dead connection looks the same."""
    log.begin()
    for text in jobs.follow(name):
        obey()
        if text is not None:
            log.add(text)
        elif _known(name, jobs, contact).ended:
            return


def _known(name: str, jobs: JobsApi, contact: Contact) -> JobState:
    state = contact(_asking(jobs, name))
    if state is None:
        raise RunFailed(
            f"the cluster at {jobs.address} does not know job {name} any more: its head was restarted; submit the "
            "recipe again to finish it"
        )
    return state


def _after_interrupt(signal: str, name: str, jobs: JobsApi, patience: Patience) -> str:
    """What became of the job, in words; stops it where that was asked for."""
    if not name:
        return f"stopped by {signal} before a job was found or submitted for certain"
    if not patience.stop_on_interrupt:
        return f"stopped by {signal}; job {name} goes on, and the same command attaches to it again"
    try:
        jobs.stop(name)
    except (NoContact, Refusal) as error:
        return f"stopped by {signal}; job {name} could not be stopped ({error})"
    return f"stopped by {signal}; job {name} was told to stop"


def _judge(name: str, state: JobState) -> None:
    if state.status == "SUCCEEDED":
        return
    lines = [line for line in state.message.splitlines() if line.strip()]
    why = f": {logs.message_of(lines[-1].strip())}" if lines else ""
    if state.status == "STOPPED":
        raise RunFailed(f"job {name} was stopped{why}; submit the recipe again to finish it")
    kind = f" ({state.error_type})" if state.error_type else ""
    if state.exit_code == Refusal.exit_code:
        raise Refusal(f"job {name} refused the recipe{why}")
    raise RunFailed(f"job {name} failed{kind}{why}")
