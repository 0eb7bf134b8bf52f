"""A cluster of three nodes on this machine that lives through many scenarios: a head and two that may be lost."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from contextlib import ExitStack
from typing import Any, Self

import psutil
import ray
from ray.cluster_utils import Cluster

from ray_merge.runtime.session import open_session

STORE_BYTES = 80_000_000

HEALTH = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 4}
"""A lost raylet is noticed after some 5 s and not 15; a machine that is only slow must not lose one."""


class Nodes:
    """A context manager; this process is connected to the cluster inside it."""

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        folder = tempfile.mkdtemp(prefix="chr-", dir="/tmp")  # short: paths of sockets
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        os.environ.update({f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()})
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "temp_dir": folder,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._stack.callback(self._cluster.shutdown)
        self._nodes = [self._add(), self._add()]
        self._stack.enter_context(open_session(self.address))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def kill_raylet(self, index: int) -> None:
        """kill -9 of one node's raylet; its workers end with it."""
        pid = self._raylet(self._nodes[index])
        os.kill(pid, signal.SIGKILL)

    def end_gracefully(self, index: int) -> None:
        """SIGTERM for one node, as a preemption notice ends it."""
        os.kill(self._raylet(self._nodes[index]), signal.SIGTERM)

    def replace(self, index: int, **variables: str) -> None:
        """What is left of a lost node goes, and a new one comes, with some variables in its environment."""
        self._cluster.remove_node(self._nodes[index], allow_graceful=False)
        self._nodes[index] = self._add(**variables)

    def workers(self) -> list[int]:
        """Processes of actors, in order of their start."""
        found = []
        for node in self._nodes:
            try:
                found += psutil.Process(self._raylet(node)).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
        return [process.pid for process in sorted(found, key=lambda one: one.pid) if _is_actor(process)]

    def wait_for_all(self, seconds: float = 60.0) -> None:
        """Both nodes are alive, as the head sees it: the next scenario begins with a whole cluster."""
        deadline = time.monotonic() + seconds
        while sum(node["Alive"] for node in ray.nodes()) != 3:
            assert time.monotonic() < deadline, f"not three nodes after {seconds} s: {ray.nodes()}"
            time.sleep(0.1)

    def _add(self, **variables: str) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, env_vars=variables)

    def _raylet(self, node: Any) -> int:
        return int(node.all_processes["raylet"][0].process.pid)


def _is_actor(process: psutil.Process) -> bool:
    try:
        name = (process.cmdline() or [""])[0]
    except psutil.Error:
        return False
    # Not ray::IDLE, and not ray::DashboardAgent, with which the raylet would go too.
    return name.startswith("ray::") and "Actor" in name
