"""A driver with an embedded Ray, for the tests that must end one: it says who is there, then works until it is stopped.

Usage: python embedded_run.py FOLDER SECONDS
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import psutil
import ray

from pool_workers import Echo, StepWorker, Write
from ray_merge.pool import Task
from ray_merge.runtime.ray_pool import RayPool
from ray_merge.runtime.session import open_session


def main(folder: str, seconds: float) -> None:
    with (
        open_session("local", num_cpus=1) as session,
        RayPool(StepWorker, session=session, workers=1, memory_bytes=None) as pool,
    ):
        done = list(pool.run([Task("a", Echo(os.getpid()))]))
        facts = {
            "value": done[0].value,
            "address": ray.get_runtime_context().gcs_address,
            "nodes": len(ray.nodes()),
            "pids": [child.pid for child in psutil.Process().children(recursive=True)],
            "folders": sorted(str(path) for path in Path(tempfile.gettempdir()).glob("rm-*")),
        }
        Path(folder, "facts.tmp").write_text(json.dumps(facts))
        Path(folder, "facts.tmp").rename(Path(folder, "facts.json"))
        list(pool.run([Task("b", Write(folder, "b", seconds))]))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
