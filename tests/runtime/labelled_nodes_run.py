"""A driver on a cluster of three simulated nodes with labels; prints where workers stood, and refusals, as JSON.

Usage: python labelled_nodes_run.py FOLDER
"""

import json
import sys
import time
from dataclasses import dataclass

import ray
from ray.cluster_utils import Cluster

from pool_workers import StepWorker
from ray_merge.errors import Refusal
from ray_merge.pool import Task
from ray_merge.recipe import Placement
from ray_merge.runtime.ray_pool import RayPool
from ray_merge.runtime.session import Session, open_session

STORE_BYTES = 80_000_000
SMALL, BIG = 10**9, 4 * 10**9


@dataclass(frozen=True)
class Where:
    """The node that the unit runs on, after some seconds of work."""

    seconds: float = 0.0

    def __call__(self) -> str:
        time.sleep(self.seconds)
        return ray.get_runtime_context().get_node_id()


def main(folder: str) -> None:
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        "temp_dir": f"{folder}/ray",
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for tier, memory in (("small", SMALL), ("big", BIG)):
        cluster.add_node(num_cpus=4, memory=memory, object_store_memory=STORE_BYTES, labels={"tier": tier})
    try:
        with open_session(cluster.address) as session:
            tiers = {node["NodeID"]: node["Labels"].get("tier") for node in ray.nodes()}
            facts = {}
            for mode, workers in (("spread", 2), ("one_per_node", 1)):
                place = Placement(mode=mode, labels={"tier": "big"})
                facts[mode] = [tiers[node] for node in where(session, place, workers, None)]
            facts["by memory"] = [tiers[node] for node in where(session, Placement(), 2, 2 * SMALL)]
            for name, labels, workers in (("absent", {"tier": "huge"}, 1), ("few", {"tier": "small"}, 5)):
                try:
                    where(session, Placement(labels=labels), workers, None)
                except Refusal as refusal:
                    facts[name] = str(refusal)
            facts["data"] = [[data, tiers[node]] for data, node in followed(session)]
            print(json.dumps(facts))
    finally:
        cluster.shutdown()


def where(session: Session, placement: Placement, workers: int, memory_bytes: int | None) -> list[str]:
    """The node of each of eight units."""
    with RayPool(
        StepWorker,
        session=session,
        workers=workers,
        memory_bytes=memory_bytes,
        placement=placement,
        start_seconds=20 if workers < 3 else 1,
    ) as pool:
        return [result.value for result in pool.run([Task(str(i), Where()) for i in range(8)])]


def followed(session: Session) -> list[tuple[str, str]]:
    """Forty units of eight data on two nodes: which data was read on which node."""
    tasks = [Task(f"{data}{i}", Where(0.05), frozenset(data)) for data in "abcdefgh" for i in range(5)]
    place = Placement(mode="one_per_node")
    with RayPool(StepWorker, session=session, workers=2, memory_bytes=None, placement=place) as pool:
        return sorted({(done.id[0], done.value) for done in pool.run(tasks)})


if __name__ == "__main__":
    main(sys.argv[1])
