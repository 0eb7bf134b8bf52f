"""A real Ray head with its dashboard and Jobs API, on free ports and in a folder of its own.

It ends exactly the processes that it started: those below the head, and those that carry its folder in their
command line or environment. (`ray stop` would end every Ray on the machine.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

READY_SECONDS = 120.0


@dataclass(frozen=True)
class RayHead:
    """Where the head answers, and what a process needs in its environment to talk to it.

    `jobs_url` is for `ray job submit --address`, `metrics_url` for Prometheus, `gcs_address` for `--address HOST:PORT`.
    """

    jobs_url: str
    metrics_url: str
    gcs_address: str
    folder: Path
    environment: dict[str, str]
    pid: int


@contextlib.contextmanager
def run_head(num_cpus: int = 2, variables: Mapping[str, str] = MappingProxyType({})) -> Iterator[RayHead]:
    """Start a head with more variables in its environment, and wait until its Jobs API answers."""
    folder = Path(tempfile.mkdtemp(prefix="rmh-", dir="/tmp"))  # short: sockets live below it
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        **variables,
    }
    ports = dict(zip(PORT_OPTIONS, free_ports(len(PORT_OPTIONS)), strict=True))
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--head",
                "--block",
                "--disable-usage-stats",
            ),
            *(f"--temp-dir={folder}", f"--num-cpus={num_cpus}", f"--object-store-memory={100_000_000}"),
            *("--include-dashboard=true", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--{name}={port}" for name, port in ports.items()),
        ],
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            **environment,
        },
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=folder,
    )
    try:
        jobs_url = f"http://127.0.0.1:{ports['dashboard-port']}"
        agent_url = f"http://127.0.0.1:{ports['dashboard-agent-listen-port']}"
        # The head answers first; it can take no job until its agent does.
        for url in (f"{jobs_url}/api/jobs/", f"{agent_url}/api/local_raylet_healthz"):
            wait_for_answer(head, url, folder / "head.log")
        metrics_url = f"http://127.0.0.1:{ports['metrics-export-port']}/metrics"
        yield RayHead(jobs_url, metrics_url, f"127.0.0.1:{ports['port']}", folder, environment, head.pid)
    finally:
        end_processes(head, folder)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


PORT_OPTIONS = (
    *("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"),
    *("metrics-export-port", "runtime-env-agent-port", "ray-client-server-port"),
    *("node-manager-port", "object-manager-port"),
)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; all are held until all are known, so they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for_answer(head: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        assert head.poll() is None, f"ray start ended with {head.returncode}: {log.read_text()[-2000:]}"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        assert time.monotonic() < deadline, f"{url} does not answer: {log.read_text()[-2000:]}"
        time.sleep(0.3)


def end_processes(head: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill the head, what is below it, and what it orphaned; twice, because a dying head may still start one."""
    for _ in range(2):
        below = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        doomed = {process.pid: process for process in [*below, *processes_of(folder)]}
        head.kill()
        for process in doomed.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(doomed.values()), timeout=10)
        head.wait(10)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that were started with the head's folder in their environment or command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid():
                continue
            if process.environ().get("RAY_TMPDIR") == str(folder) or any(
                str(folder) in part for part in process.cmdline()
            ):
                found.append(process)
    return found
