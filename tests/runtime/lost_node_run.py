"""A driver on a cluster of two simulated nodes, one of which is lost in mid-unit; prints what came back as JSON.

Usage: python lost_node_run.py FOLDER
"""

import json
import sys
import time
from pathlib import Path
from threading import Thread

import ray
from ray.cluster_utils import Cluster

from pool_workers import StepWorker, Write
from ray_merge.pool import Task
from ray_merge.recipe import Placement
from ray_merge.runtime.ray_pool import RayPool
from ray_merge.runtime.session import open_session

STORE_BYTES = 80_000_000
UNITS = 14


def main(folder: str) -> None:
    head = {
        "num_cpus": 1,
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        "temp_dir": f"{folder}/ray",
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    try:
        with (
            open_session(cluster.address) as session,
            RayPool(
                StepWorker,
                session=session,
                workers=2,
                memory_bytes=None,
                placement=Placement(mode="one_per_node"),
                attempts=1,
            ) as pool,
        ):
            spread = len({node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")})
            loss = Thread(target=lose, args=(cluster, node, Path(folder)))
            loss.start()
            started = time.monotonic()
            done = list(pool.run([Task(str(i), Write(folder, f"unit-{i}", 0.4)) for i in range(UNITS)]))
            loss.join()
            attempts = [result.attempts for result in done]
            facts = {"values": [result.value for result in done], "attempts": attempts, "nodes": spread}
            print(json.dumps({**facts, "seconds": time.monotonic() - started}))
    finally:
        cluster.shutdown()


def lose(cluster: Cluster, node: object, folder: Path) -> None:
    while not (folder / "unit-4").exists():
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)


if __name__ == "__main__":
    main(sys.argv[1])
