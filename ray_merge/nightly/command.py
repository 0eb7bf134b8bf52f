"""What `jobs/nightly.py` does with its options: run a night here, or have a RayJob run it; say it, and judge it."""

from __future__ import annotations

import json

import typer

from ray_merge.errors import RunFailed
from ray_merge.interrupts import Interrupts
from ray_merge.nightly.entries import recipe_urls
from ray_merge.nightly.kubernetes import Kubernetes
from ray_merge.nightly.night import Night, run_night, unfinished
from ray_merge.nightly.rayjob import Waiting, read_template, run_rayjob
from ray_merge.show_progress import Progress


def say(text: str) -> None:
    """One line on stderr."""
    typer.echo(f"nightly: {text}", err=True)


def run_here(night: Night, *, as_json: bool) -> None:
    """Run a night in this process and its Ray.

    Raises:
        Refusal: there is no recipe, or no such day.
        RunFailed: not everything is complete.
    """
    with Progress() as progress:
        summary = run_night(night, say, progress)
    if as_json:
        typer.echo(json.dumps(summary.document(), indent=1))
    typer.echo(f"summary: {summary.url}", err=as_json)
    if not summary.complete:
        raise RunFailed(summary.sentence())


def run_there(night: Night, template: str, namespace: str | None, server: Kubernetes, how: Waiting) -> None:
    """Have the night's RayJob run it, and look at the manifests afterwards.

    Raises:
        Refusal: nothing was created.
        RunFailed: the RayJob did not succeed, or a merge has no manifest.
    """
    recipe_urls(night.recipes)  # refuses a folder without recipes before a cluster is started for it
    manifest = read_template(template)
    date, place = night.day, namespace or server.namespace
    with Interrupts() as asked:
        try:
            run_rayjob(manifest, date, place, server, how)
        except RunFailed as error:
            if not asked.name:
                raise
            raise RunFailed(f"{error}; the RayJob goes on, and the same command attaches to it") from error
    left = unfinished(night)
    if left:
        raise RunFailed(f"the RayJob succeeded, but {len(left)} thing(s) are not complete, first {left[0]}")
    say("complete: every merge has its manifest")
