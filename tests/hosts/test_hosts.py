"""All scenarios of run.py where RAY_MERGE_HOSTS_TEST is set: they take minutes, and all cores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hosts import TAG, why_not
from s3_server import find_weed

RUN = Path(__file__).parent / "run.py"
VARIABLE = "RAY_MERGE_HOSTS_TEST"

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} is not set: takes some minutes"),
    pytest.mark.skipif(find_weed() is None, reason="no `weed` program"),
]


@pytest.fixture(scope="module", autouse=True)
def possible():
    if missing := why_not():
        pytest.skip(missing)


def left_behind() -> list[psutil.Process]:
    """Processes of any run that are there still, whatever namespaces they are in."""
    found = []
    for process in psutil.process_iter():
        try:
            if TAG in process.environ():
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_nothing() -> list[psutil.Process]:
    deadline = time.monotonic() + 10
    while (left := left_behind()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_a_cluster_of_three_hosts_tells_the_truth_through_every_loss():
    done = subprocess.run([sys.executable, str(RUN)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["passed"] == summary["planned"] >= 10
    assert wait_for_nothing() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_no_process_and_no_network(number):
    cables = set(psutil.net_if_addrs())
    run = subprocess.Popen([sys.executable, str(RUN), "undisturbed"], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert "the cluster is up" in run.stdout.readline()
    inside = left_behind()
    assert len(inside) > 10
    folder = Path(inside[0].environ()[TAG])
    run.send_signal(number)
    assert run.wait(30) == (128 + number if number == signal.SIGTERM else -number)
    assert wait_for_nothing() == []
    assert set(psutil.net_if_addrs()) == cables
    assert folder.exists() == (number == signal.SIGKILL)  # files are all that a killed run leaves
    shutil.rmtree(folder, ignore_errors=True)
