"""What a night's pod and its RayJob must agree on: the pod judges by manifests, so it looks where the job writes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields

from ray_merge.errors import Refusal, shown
from ray_merge.nightly.night import Night

SHARED = ("recipes", "output", "summary")
"""Options that decide what is made, and where: the pod and the entrypoint have the same."""

OF_THE_JOB = ("engine", "address", "workers", "memory", "device")
"""Options that only what merges can obey."""


def check_handed_on(night: Night, entrypoint: str) -> None:
    """Refuse options that the RayJob would not obey.

    Args:
        night: the pod's.
        entrypoint: of the RayJob, a shell command.

    Raises:
        Refusal: with both values.
    """
    try:
        words = shlex.split(entrypoint)
    except ValueError as error:
        raise Refusal(f"the RayJob's entrypoint {shown(entrypoint)} is no shell command: {error}") from error
    for name in SHARED:
        ours, theirs = getattr(night, name), _value(words, f"--{name}")
        if (ours or "").rstrip("/") != (theirs or "").rstrip("/"):
            raise Refusal(
                f"--{name} is {ours or 'not given'} here and {theirs or 'not given'} in the RayJob's entrypoint "
                f"{shown(entrypoint)}: give both the same"
            )
    defaults = {field.name: field.default for field in fields(Night)}
    for name in OF_THE_JOB:
        value = getattr(night, name)
        if value != defaults[name]:
            raise Refusal(
                f"--{name} {value} would have no effect here: write it into the entrypoint of the RayJob's template"
            )


def _value(words: Sequence[str], option: str) -> str | None:
    """What stands after an option, at its last place."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found
