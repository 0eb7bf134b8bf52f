"""Ray on hosts: a head that does no work, with dashboard and token, and workers that come and go."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hosts import REPOSITORY, Host, Hosts

HEAD = "10.77.0.1"
DASHBOARD_PORT = 8265
READY_SECONDS = 240.0
STARTS = 3

WORKER_BYTES = 2_000_000_000
"""Of memory that a worker host tells Ray, where nothing else is asked for: room for one worker and more."""

HEALTH = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 3000, "failure_threshold": 4}
"""A silent host is given up after some 16 s; with Ray's defaults (3 s, 10 s, 5 times) after some 65."""


class RayCluster:
    """A head and its workers, each in a host of its own.

    Args:
        hosts: where they are made.
        storage: environment of a client of the store, as hosts on the bridge reach it.
        folder: for the output of `ray start`.
    """

    def __init__(self, hosts: Hosts, storage: Mapping[str, str], folder: Path) -> None:
        self._hosts, self._storage, self._folder = hosts, storage, folder
        self.token = secrets.token_hex(32)
        self.members: dict[str, Host] = {}
        self._next = 1

    @property
    def environment(self) -> dict[str, str]:
        """Of every process of Ray and of its clients; nothing of this machine's own."""
        return {
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"]
            ),
            "HOME": "/tmp/home",
            "PYTHONPATH": str(REPOSITORY),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self) -> None:
        """The head and two workers; returns when all three are known."""
        self._add(
            "head",
            HEAD,
            *(
                "--head",
                "--port=6379",
                "--num-cpus=0",
                f"--memory={WORKER_BYTES}",
                "--include-dashboard=true",
            ),
            *(f"--dashboard-host={HEAD}", f"--dashboard-port={DASHBOARD_PORT}"),
        )
        self.add_worker("worker-1")
        self.add_worker("worker-2")
        self.wait()

    def add_worker(self, name: str, memory: int = WORKER_BYTES) -> None:
        """One more worker of one CPU; `wait` waits until all know of it."""
        self._next += 1
        self._add(
            name, f"10.77.0.{self._next}", f"--address={HEAD}:6379", "--num-cpus=1", f"--memory={memory}"
        )

    def lose(self, name: str) -> None:
        """One host's power fails."""
        self.members.pop(name).lose()

    def lose_all(self) -> None:
        """Nothing is left of this cluster; `start` makes the next one, at the same address."""
        for name in list(self.members):
            self.lose(name)

    def wait(self) -> None:
        """Until the head knows of all members, and of no other node."""
        deadline = time.monotonic() + READY_SECONDS
        wanted = sorted(host.address for host in self.members.values())
        while (alive := self._alive()) != wanted:
            assert time.monotonic() < deadline, f"{alive} are alive, not {wanted}"
            time.sleep(0.5)

    def ask(self, path: str) -> Any:
        """A document of the dashboard's API; None while there is none."""
        request = urllib.request.Request(f"http://{HEAD}:{DASHBOARD_PORT}{path}")
        request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                request, timeout=10
            ) as answer:
                return json.load(answer)
        except OSError:
            return None

    def jobs(self) -> dict[str, str]:
        """The state of each job by its name."""
        return {job["submission_id"]: job["status"] for job in self.ask("/api/jobs/") if job["submission_id"]}

    def _alive(self) -> list[str]:
        """Addresses of the nodes that the head takes for alive; a lost one is among them for some time."""
        if self.ask("/api/jobs/") is None:
            return []
        known = self.ask("/nodes?view=summary") or {"data": {"summary": []}}
        raylets = [node["raylet"] for node in known["data"]["summary"]]
        return sorted(one["nodeManagerAddress"] for one in raylets if one.get("state") == "ALIVE")

    def _add(self, name: str, address: str, *options: str) -> None:
        """A host with its `ray start`, which gives up after 30 s: too few on a machine that is very busy."""
        said = ""
        for _ in range(STARTS):
            host = self._hosts.add(name, address)
            code, said = self._ray_start(host, *options)
            if code == 0:
                self.members[name] = host
                return
            host.lose()
        raise AssertionError(f"ray start on {name} failed {STARTS} times, the last time: {said[-2000:]}")

    def _ray_start(self, host: Host, *options: str) -> tuple[int, str]:
        health = {f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()}
        log = self._folder / f"ray-start-{host.name}.log"
        with log.open("w") as out:
            process = host.start(
                [
                    "ray",
                    "start",
                    f"--node-ip-address={host.address}",
                    "--object-store-memory=100000000",
                    *options,
                ],
                {**self.environment, **self._storage, **health},
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            return process.wait(READY_SECONDS), log.read_text()


__all__ = ["DASHBOARD_PORT", "HEAD", "RayCluster"]
