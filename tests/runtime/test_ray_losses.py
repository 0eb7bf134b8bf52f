"""Losses that need a cluster of their own: a node, and a worker that takes too much memory."""

import json
import os
from pathlib import Path

import psutil
import pytest
from driver_process import TESTS, end, python

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def output_of(script, *arguments, folder, seconds, **environment):
    driver = python(
        TESTS / "runtime" / script, *arguments, folder=folder, RAY_TMPDIR=str(folder), **environment
    )
    try:
        output, errors = driver.communicate(timeout=seconds)
        assert driver.returncode == 0, errors
        return output
    finally:
        end([driver], [folder])


def test_the_loss_of_a_node_changes_no_result_and_burns_no_attempt():
    folder = Path(f"/tmp/rmt-{os.getpid()}-node")
    facts = json.loads(
        output_of("lost_node_run.py", folder, folder=folder, seconds=120, RAY_AUTH_MODE="disabled")
    )
    assert facts["nodes"] == 2
    assert sorted(facts["values"]) == sorted(f"unit-{i}" for i in range(30))
    # attempts=1 in that run: one counted death would have failed it. The other worker went on meanwhile.
    assert sorted(facts["attempts"]) == [1] * 29 + [2]


def test_a_worker_killed_for_memory_ends_the_run_with_the_planned_number():
    folder = Path(f"/tmp/rmt-{os.getpid()}-oom")
    memory = psutil.virtual_memory()
    spare = 3 << 30  # other processes must not change by that much during the test
    if memory.available < 3 * spare:
        pytest.skip(f"{memory.available} bytes of memory are free, and this test takes up to {2 * spare}")
    threshold = (memory.total - memory.available + spare) / memory.total
    output = output_of(
        "out_of_memory_run.py",
        folder=folder,
        seconds=120,
        RAY_AUTH_MODE="disabled",
        RAY_memory_usage_threshold=f"{threshold:.4f}",
        RAY_memory_monitor_refresh_ms="100",
    )
    assert "unit hog failed after 2 attempt(s)" in output
    assert "OutOfMemoryError" in output
    assert "the plan gave it 123456789 bytes" in output
