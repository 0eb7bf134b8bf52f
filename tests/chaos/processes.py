"""Drivers and proxies as forked processes: what they import was imported once, before the fork.

A driver is the command line itself, `ray_merge.cli.main`, in a process of its own that can be killed; a scenario
takes a second and not the ten that a new Python with torch and s3fs takes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fault_proxy import fault_proxy
from random_faults import RandomFaults

DEADLINE_SECONDS = 150.0
"""A run takes 1 to 3 s; with 30 % of its requests failing some 20 s; none may take longer than this."""


def warm_up() -> None:
    """Import what a run imports, so that forked processes have it; starts no thread and opens no connection."""
    import aiobotocore.session  # noqa: F401
    import botocore.session
    import pyarrow.parquet  # noqa: F401
    import s3fs  # noqa: F401
    import torch

    import ray_merge.cli
    import ray_merge.engines
    import ray_merge.work.learn_worker
    import ray_merge.work.stage_worker
    import ray_merge.work.worker  # noqa: F401
    from ray_merge.storage.s3 import _tables

    torch.set_num_threads(1)
    # The tables that every client of a process shares; a real one would start s3fs' thread.
    session = botocore.session.Session()
    session.register_component("data_loader", _tables())
    session.create_client("s3", "us-east-1", aws_access_key_id="none", aws_secret_access_key="none")


@dataclass
class Ended:
    """How a driver ended: exit code (negative: the signal; None: past the deadline), last line, seconds."""

    code: int | None
    last: str
    seconds: float


@dataclass
class Driver:
    """A running driver."""

    pid: int
    log: Path
    started: float

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def alive_after(self, seconds: float) -> bool:
        """Wait so long from its start, or until it has ended; True when it runs still."""
        while (left := self.started + seconds - time.monotonic()) > 0 and self.is_alive():
            time.sleep(min(left, 0.01))
        return self.is_alive()

    def is_alive(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, seconds: float = DEADLINE_SECONDS) -> Ended:
        """Its end; a driver past the deadline writes all its stacks into its log and is killed."""
        deadline = time.monotonic() + seconds
        code: int | None = None
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGABRT)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.003)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return Ended(code, lines[-1] if lines else "", time.monotonic() - self.started)


def start_driver(
    recipe: Path,
    cache: Path,
    log: Path,
    environment: Mapping[str, str],
    before: Callable[[], None] = lambda: None,
) -> Driver:
    """`ray-merge run RECIPE --engine local` in a forked process; `before` is called in it first."""
    arguments = ["run", str(recipe), "--engine", "local", "--workers", "2", "--cache-dir", str(cache)]
    return start_command(arguments, log, environment, before)


def start_command(
    arguments: list[str],
    log: Path,
    environment: Mapping[str, str],
    before: Callable[[], None] = lambda: None,
) -> Driver:
    """`ray-merge` with any arguments in a forked process."""
    log.touch()
    started = time.monotonic()
    pid = os.fork()
    if pid:
        return Driver(pid, log, started)
    _become_command(arguments, log, environment, before)


def _become_command(
    arguments: list[str], log: Path, environment: Mapping[str, str], before: Callable[[], None]
) -> NoReturn:
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number in (1, 2):
            os.dup2(descriptor, number)
        faulthandler.enable()
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  (for the life of this process)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.environ.update(environment)
        before()
        from ray_merge.cli import main

        main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 98
    except BaseException:  # noqa: BLE001  (the log has it)
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def proxy_process(endpoint: str, rule: RandomFaults) -> Iterator[tuple[str, dict[str, int]]]:
    """A fault proxy in a forked process: its address, and a dict that has its counts at the end."""
    counts: dict[str, int] = {}
    to_child, from_child = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        _become_proxy(endpoint, rule, to_child, from_child)
    os.close(to_child[0])
    os.close(from_child[1])
    with open(from_child[0]) as answers:
        try:
            yield answers.readline().strip(), counts
        finally:
            os.close(to_child[1])  # the sign to end
            if select.select([answers], [], [], 10.0)[0]:
                counts.update(json.loads(answers.readline() or "{}"))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _become_proxy(
    endpoint: str, rule: RandomFaults, to_child: tuple[int, int], from_child: tuple[int, int]
) -> NoReturn:
    os.close(to_child[1])
    os.close(from_child[0])
    with fault_proxy(endpoint, rule) as proxy:
        os.write(from_child[1], f"{proxy.endpoint}\n".encode())
        os.read(to_child[0], 1)  # ends when the parent closes its end
        made = {"requests": len(proxy.calls), "failed": sum(rule.made.values()), **rule.made}
        os.write(from_child[1], f"{json.dumps(made)}\n".encode())
        os._exit(0)
