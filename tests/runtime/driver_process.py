"""Drivers in processes of their own, for tests that end them or that need another Ray than the shared session."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

TESTS = Path(__file__).parent.parent


def python(*arguments, folder, **environment):
    """Start a Python that imports what this one can, with its own place for Ray's files."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    Path(folder, "ray").mkdir(parents=True)
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**inherited, "PYTHONPATH": path, "TMPDIR": str(folder), "HOME": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not come in {seconds} s"
        time.sleep(0.1)
    return json.loads(path.read_text())


def still_alive(pids, seconds):
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return psutil.wait_procs(processes, timeout=seconds)[1]


def end(drivers, folders):
    """Kill the drivers that still run with all below them, and remove their folders."""
    for driver in drivers:
        if driver.poll() is None:
            children = psutil.Process(driver.pid).children(recursive=True)
            driver.kill()
            kill(child.pid for child in children)
        driver.communicate()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def kill(pids):
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
