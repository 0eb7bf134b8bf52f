import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest

import ray_merge.runtime
from ray_head import processes_of, run_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = """
import os, sys
from dataclasses import dataclass
from ray_merge.pool import Task
from ray_merge.runtime.ray_pool import RayPool
from ray_merge.runtime.session import open_session

@dataclass(frozen=True)
class Double:
    number: int

class Doubler:
    def run(self, unit):
        return 2 * unit.number

with open_session("auto") as session, RayPool(Doubler, session=session, workers=1, memory_bytes=10**6) as pool:
    print("sum", sum(done.value for done in pool.run([Task(str(i), Double(i)) for i in range(10)])), flush=True)
sys.exit(int(sys.argv[1]))
"""


def finished(client, job, seconds=120):
    deadline = time.monotonic() + seconds
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.3)
    return client.get_job_info(job)


def test_a_submitted_script_runs_on_the_cluster_and_its_exit_status_is_known(tmp_path, monkeypatch):
    from ray.job_submission import JobStatus, JobSubmissionClient

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    package = Path(ray_merge.runtime.__file__).parent.parent
    shutil.copytree(package, tmp_path / "ray_merge", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "script.py").write_text(SCRIPT)
    with run_head() as head:
        client = JobSubmissionClient(head.jobs_url)
        jobs = [
            client.submit_job(
                entrypoint=f"{sys.executable} script.py {status}", runtime_env={"working_dir": str(tmp_path)}
            )
            for status in (0, 3)
        ]
        good, bad = (finished(client, job) for job in jobs)
        logs = [client.get_job_logs(job) for job in jobs]
        pids = [process.pid for process in processes_of(head.folder)]
    assert good.status == JobStatus.SUCCEEDED, logs[0]
    assert bad.status == JobStatus.FAILED
    assert (good.driver_exit_code, bad.driver_exit_code) == (0, 3)
    assert all("sum 90" in log for log in logs)
    assert len(pids) > 3
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert not head.folder.exists()
