"""Some scenarios with every test run, all of them where RAY_MERGE_CHAOS gives the minutes (see run.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from s3_server import find_weed

HERE = Path(__file__).parent
MINUTES = "RAY_MERGE_CHAOS"
SAMPLE = 10

pytestmark = [pytest.mark.s3, pytest.mark.skipif(find_weed() is None, reason="no `weed` program")]


def play(*options: object) -> dict:
    """The report of one call of run.py."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, HERE / "run.py", *options, "--report", report]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True, check=False
        )
        assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(report.read_text())


def sample() -> dict:
    kinds = ("fault-mixed", "fault-lose", "kill-driver-*", "two-drivers", "preempted", "memory-limit")
    return play(
        "--engine", "local", "--seed", 1, "--count", SAMPLE, "--lanes", 2, "--minutes", 5, "--kinds", *kinds
    )


@pytest.mark.slow
@pytest.mark.own_process(work=sample)
def test_a_sample_of_disturbed_runs_loses_and_corrupts_nothing(answer):
    failed = [verdict for verdict in answer["scenarios"] if not verdict["passed"]]
    assert failed == []
    assert answer["played"] == SAMPLE
    ends = {verdict["ends"][0]["code"] for verdict in answer["scenarios"]}
    assert -9 in ends  # the kills were in time, so something was really disturbed
    assert sum(int(v["notes"].get("failed", 0)) for v in answer["scenarios"]) > 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(MINUTES not in os.environ, reason=f"{MINUTES} gives no minutes for the 500 scenarios")
def test_all_scenarios_lose_and_corrupt_nothing():
    report = play("--minutes", os.environ[MINUTES])
    assert [verdict for verdict in report["scenarios"] if not verdict["passed"]] == []
    assert report["played"] == report["planned"]
