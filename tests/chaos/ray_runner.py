"""Plays scenarios through Ray: a process of its own with one kept cluster (`ray_lane.py`), watched from here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
from judge import Verdict
from processes import DEADLINE_SECONDS
from scenarios import Scenario

from s3_server import client_environment

HERE = Path(__file__).parent
MOST_SECONDS = 6 * DEADLINE_SECONDS
"""Without a word from the lane, that is: start of the cluster, or one scenario with its rerun."""


def play_through_ray(
    scenarios: Sequence[Scenario],
    folder: Path,
    *,
    deadline: float,
    done: Callable[[dict[str, object]], None],
) -> None:
    """Play scenarios one after the other until `deadline` (of time.monotonic); `done` gets each verdict.

    A lane that says nothing for too long counts as hung, and what is left is not played.
    """
    lane = folder / "ray"
    lane.mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    path = os.pathsep.join([str(HERE.parent.parent), str(HERE), str(HERE.parent)])
    process = subprocess.Popen(
        [sys.executable, str(HERE / "ray_lane.py"), str(lane), str(deadline)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**inherited, **client_environment(""), "PYTHONPATH": path, "RAY_AUTH_MODE": "disabled"},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps([asdict(scenario) for scenario in scenarios]))
    process.stdin.close()
    try:
        _follow(process, scenarios, done)
    finally:
        _end(process)


def _follow(
    process: subprocess.Popen[str],
    scenarios: Sequence[Scenario],
    done: Callable[[dict[str, object]], None],
) -> None:
    import selectors

    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        for scenario in scenarios:
            if not waiting.select(MOST_SECONDS):
                done(Verdict(scenario, hung=[f"nothing for {MOST_SECONDS:.0f} s"]).document())
                return
            line = process.stdout.readline()
            if not line:  # past the deadline, or it died; what was not played is missing from the counts
                return
            done(json.loads(line))


def _end(process: subprocess.Popen[str]) -> None:
    """The lane with everything below it, gently where it ends by itself."""
    started = time.monotonic()
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    while process.poll() is None and time.monotonic() < started + 30:
        time.sleep(0.1)
    for one in [*below, psutil.Process(process.pid)] if process.poll() is None else below:
        if one.is_running():
            one.kill()
    process.wait()
