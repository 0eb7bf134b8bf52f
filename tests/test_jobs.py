"""Job scripts run by their path, and end with the exit code of the command that they stand for."""

import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[1] / "jobs"


@pytest.mark.parametrize("script", sorted(path.name for path in JOBS.glob("*.py")))
def test_a_job_script_is_its_command_on_the_cluster(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(JOBS / script), str(tmp_path / "missing.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "missing.yaml" in done.stderr.splitlines()[-1]
