"""The hook: a command of the user's, such as lm-evaluation-harness, once for each complete merge."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_merge.drive.events import Event
from ray_merge.drive.outputs import Target
from ray_merge.errors import Refusal
from ray_merge.spec import Merge
from ray_merge.storage.store import Stores

TAIL_BYTES = 4000
"""Of what a command prints; its last table is there."""


@dataclass(frozen=True, slots=True)
class Called:
    """One merge as a command sees it: its name and its checkpoint's folder."""

    name: str
    path: str


def check_command(command: str, merges: Sequence[tuple[Merge, Target]], stores: Stores) -> list[Called]:
    """What the command will be run for.

    Args:
        command: with {path} or {name}.
        merges: the complete ones.
        stores: opens their folders.

    Raises:
        Refusal: it would do the same for every merge, or a merge has no folder that a command can read.
    """
    if "{path}" not in command and "{name}" not in command:
        raise Refusal(
            f"--command {command!r} holds neither {{path}} nor {{name}}, so it would do the same for every merge; "
            "write for example lm_eval --model_args pretrained={path}"
        )
    called = []
    for merge, target in merges:
        root = stores.open(target.url).local_root
        if root is None:
            raise Refusal(
                f"--command: merge {merge.name!r} lies at {target.url}, and a command reads local folders; give "
                "--output with a local path, or mount the bucket"
            )
        if merge.export == "adapter" and "{path}" in command:
            raise Refusal(
                f"--command: merge {merge.name!r} is exported as an adapter, so {{path}} would be no checkpoint; write "
                "export: both, or leave it out with --only"
            )
        called.append(Called(merge.name, str(root.absolute())))
    return called


def run_commands(
    command: str, called: Sequence[Called], progress: Callable[[Event], None]
) -> dict[str, dict[str, Any]]:
    """Merge -> the command line, its exit code, and the end of what it printed on stdout; stderr is passed on.

    Args:
        command: a line of sh, with {path} and {name}, which are quoted where they need it.
        called: the merges.
        progress: called for each.
    """
    found = {}
    for count, one in enumerate(called, start=1):
        line = command.replace("{path}", shlex.quote(one.path)).replace("{name}", shlex.quote(one.name))
        progress(Event(kind="command", text=line, units=(count, len(called))))
        started = time.monotonic()
        code, tail = _run(line)
        found[one.name] = {
            "command": line,
            "exit_code": code,
            "stdout_tail": tail,
            "seconds": round(time.monotonic() - started, 3),
        }
    return found


def _run(line: str) -> tuple[int, str]:
    with tempfile.TemporaryDirectory(prefix="ray-merge-command-") as folder:
        kept = Path(folder) / "stdout"
        with kept.open("wb") as stdout:
            # A session of its own: what the shell started ends with it when this run is stopped.
            process = subprocess.Popen(
                ["/bin/sh", "-c", line], stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True
            )
            try:
                code = process.wait()
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise
        with kept.open("rb") as file:
            file.seek(max(0, kept.stat().st_size - TAIL_BYTES))
            return code, file.read().decode("utf-8", "replace")
