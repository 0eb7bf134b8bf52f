"""Job scripts run by their path, and end with the exit code of the command that they stand for."""

import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[1] / "jobs"


OPTIONS = {
    "nightly.py": ("--recipes",),  # what follows is a file of a folder that is not there
    "submit.py": ("--address", "http://127.0.0.1:1"),
}
"""In front of the recipe."""


@pytest.mark.parametrize("script", sorted(path.name for path in JOBS.glob("*.py")))
def test_a_job_script_refuses_a_recipe_that_is_not_there(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(JOBS / script), *OPTIONS.get(script, ()), str(tmp_path / "missing")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "missing" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", sorted(path.name for path in JOBS.glob("*.py")))
def test_a_job_script_explains_itself(script):
    done = subprocess.run(
        [sys.executable, str(JOBS / script), "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("Usage: ")
