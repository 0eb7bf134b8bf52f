"""A night that a RayJob runs, as the pod that waits for it sees it: look first, have it run, judge by the manifests.

A night with nothing to make starts no cluster. What arrives or changes while the job runs belongs to the next night.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from ray_merge.drive.targets import incomplete
from ray_merge.errors import JobOver, RunFailed, Unwatched
from ray_merge.interrupts import Interrupts
from ray_merge.nightly.entries import Entry, recipe_urls
from ray_merge.nightly.handed_on import check_handed_on
from ray_merge.nightly.kubernetes import Kubernetes
from ray_merge.nightly.night import Night, look_at_all, summary_of
from ray_merge.nightly.rayjob import Waiting, day_of_job, job_of, read_template, run_rayjob
from ray_merge.nightly.summary import put_summary
from ray_merge.storage.store import Stores


def run_there(
    night: Night,
    template: str,
    namespace: str | None,
    server: Kubernetes,
    how: Waiting,
    *,
    of_job: str | None = None,
) -> None:
    """Have the night's RayJob make what is missing, if anything is, and look at the manifests afterwards.

    Args:
        night: which; its options must be those of the template's entrypoint.
        template: file or URL of the RayJob.
        namespace: of the RayJob; that of this pod by default.
        server: the API server.
        how: to wait.
        of_job: Job of Kubernetes whose scheduled time says which night it is, in place of the clock.

    Raises:
        Refusal: nothing was created.
        RunFailed: a recipe is refused, or a merge has no manifest.
        JobOver: the RayJob did not succeed.
        Unwatched: the API server or the store is silent, it took too long, or a signal came.
    """
    manifest, place = read_template(template), namespace or server.namespace
    check_handed_on(night, manifest["spec"]["entrypoint"])
    with Interrupts() as asked:
        try:
            # Once for all: this may take until after midnight, and so may the job.
            date = day_of_job(of_job, place, server, how) if of_job else night.day
            _run(replace(night, date=date), job_of(manifest, date, place), server, how, asked)
        except RunFailed as error:
            if not asked.name or isinstance(error, JobOver):
                raise
            raise Unwatched(
                f"stopped by {asked.name}; if there is a RayJob, it goes on, and the same command attaches to it"
            ) from error


def _run(night: Night, job: dict[str, object], server: Kubernetes, how: Waiting, asked: Interrupts) -> None:
    began, before = time.monotonic(), []
    for entry in look_at_all(night, recipe_urls(night.recipes)):
        asked.obey()
        before.append(entry)
        how.say(entry.words())
    if any(entry.targets for entry in before):
        run_rayjob(job, server, how)
    else:
        how.say("nothing to make: no RayJob is created")
        summary = put_summary(summary_of(night, before, began, stopped=""), night.summary_folder)
        how.say(f"summary: {summary.url}")
    _judge(night, before, how)
    asked.obey()


def _judge(night: Night, before: Sequence[Entry], how: Waiting) -> None:
    """Whether all that there was to make is there.

    Raises:
        RunFailed: a recipe is refused, or a merge has no manifest.
        Unwatched: the store did not let itself be looked at.
    """
    stores, there = Stores(), recipe_urls(night.recipes)
    left = [f"{entry.recipe} is refused: {entry.why}" for entry in before if entry.state == "refused"]
    again = {
        entry.recipe: {target.url for target in entry.targets}
        for entry in before
        if entry.state == "failed" or incomplete(entry.targets, stores)
    }
    unknown = []
    # Looked at anew: what changed before the job came to it is complete under another id.
    for now in look_at_all(night, [url for url in again if url in there]):
        if now.state == "failed":
            unknown.append(f"{now.recipe} cannot be looked at: {now.why}")
        elif now.why:
            left.append(f"{now.recipe} is refused: {now.why}")
        for target in now.targets:
            if target.url in again[now.recipe] or not again[now.recipe]:
                left.append(f"{target.url} has no manifest")
            else:
                how.say(f"{target.url}: new, next night")
    for url in sorted({*there} - {entry.recipe for entry in before}):
        how.say(f"{url}: new, next night")
    for url in sorted({*again} - {*there}):
        how.say(f"{url}: removed during the night")
    if left:
        raise RunFailed(f"{len(left)} thing(s) are not complete, first {left[0]}")
    if unknown:
        raise Unwatched(f"{unknown[0]}; run the same command again")
    how.say("complete: every merge has its manifest")
