"""What `jobs/nightly.py` does where it runs the night itself; there.py has the other way, a RayJob."""

from __future__ import annotations

import json

import typer

from ray_merge import logs
from ray_merge.errors import Refusal, RunFailed
from ray_merge.nightly.night import Night, run_night
from ray_merge.show_progress import Progress


def say(text: str) -> None:
    """One line on stderr."""
    logs.say(f"nightly: {text}", json_text=text)


def refuse(given: dict[str, bool], why: str) -> None:
    """Refuse options that would have no effect.

    Args:
        given: option -> whether it was.
        why: it would have none.

    Raises:
        Refusal: one was given.
    """
    for option, is_given in given.items():
        if is_given:
            raise Refusal(f"{option} {why}; leave it out")


def run_here(night: Night, *, as_json: bool, refused_ok: bool = False) -> None:
    """Run a night in this process and its Ray.

    Args:
        night: which.
        as_json: print the summary.
        refused_ok: a night of which only refused recipes are left has done what it could.

    Raises:
        Refusal: there is no recipe, or no such day.
        RunFailed: not everything is complete.
    """
    with Progress() as progress:
        summary = run_night(night, say, progress)
    if as_json:
        typer.echo(json.dumps(summary.document(), indent=1))
    said = f"summary: {summary.url}"
    if as_json:
        logs.say(said)
    else:
        typer.echo(said)
    if refused_ok and summary.only_refusals_left:
        return
    if not summary.complete:
        raise RunFailed(summary.sentence())
