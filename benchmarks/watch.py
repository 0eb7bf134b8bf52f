"""What one command costs: wall, CPU, resident memory and bytes, summed over its whole tree of processes.

Owns: reading /proc 20 times a second while the command runs, and telling Ray's daemons from our processes. The
other benchmarks call `watch`; nothing here knows what the command does.

What is counted, and what is not:

* wall: from the start of the process to its end.
* CPU: user + system of every process of the tree, as last seen; a process that lives less than one tick is counted
  only where its parent waited for it.
* resident memory: VmRSS summed over the tree without Ray's daemons at the moment of the peak. Shared pages are
  counted once per process, so it is an upper bound; PSS (shared pages divided) is read if it is asked for.
* bytes: rchar and wchar of /proc/PID/io, i.e. what went through read, write and copy_file_range, page cache
  included; reads through a memory map are not seen. As last seen too. The kernel adds a child's bytes to its parent's
  when the parent waits for it; they count once.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

DAEMONS = ("gcs_server", "raylet/raylet", "agent", "monitor", "dashboard", "log_monitor")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
INTERVAL_SECONDS = 0.05
PSS_EVERY = 10  # smaps_rollup walks all pages of a process, so it is read in every tenth look only
STDERR_TAIL = 2000


class Stat(NamedTuple):
    """One process as /proc/PID/stat has it."""

    parent: int
    started: int
    cpu_seconds: float
    rss_bytes: int


class Bytes(NamedTuple):
    """What a process read and wrote through system calls."""

    read: int
    written: int


@dataclass(frozen=True)
class Cost:
    """What one command cost.

    Attributes:
        seconds: wall.
        cpu_seconds: user + system of all its processes, Ray's daemons included.
        daemon_cpu_seconds: the daemons' part of it.
        peak_bytes: resident, at the moment of the peak: driver, worker, idle, and their sum as total.
        largest_worker_bytes: the highest resident memory of any one worker process.
        pss_bytes: the highest PSS, 0 if it was not asked for.
        moved: bytes by rchar and wchar, daemons left out.
    """

    seconds: float
    cpu_seconds: float
    daemon_cpu_seconds: float
    peak_bytes: Mapping[str, int]
    largest_worker_bytes: int
    pss_bytes: int
    moved: Bytes


@dataclass
class _Seen:
    """What is remembered of processes that may end between two looks, by (pid, start time)."""

    cpu: dict[tuple[int, int], float] = field(default_factory=dict)
    moved: dict[tuple[int, int], Bytes] = field(default_factory=dict)
    parents: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    daemons: set[tuple[int, int]] = field(default_factory=set)
    peak: dict[str, int] = field(default_factory=lambda: {"total": 0})
    pss_bytes: int = 0
    largest_worker: int = 0


def processes() -> dict[int, Stat]:
    """Every process of the machine that can be read."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            stat = read_stat(int(name))
            if stat is not None:
                found[int(name)] = stat
    return found


def read_stat(pid: int) -> Stat | None:
    """One process, or None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    parts = text.rpartition(")")[2].split()
    return Stat(
        int(parts[1]), int(parts[19]), (int(parts[11]) + int(parts[12])) / TICKS, int(parts[21]) * PAGE_BYTES
    )


def descendants(root: int, table: Mapping[int, Stat]) -> list[int]:
    """`root` and everything below it."""
    children: dict[int, list[int]] = {}
    for pid, stat in table.items():
        children.setdefault(stat.parent, []).append(pid)
    found, queue = [], [root] if root in table else []
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += children.get(pid, [])
    return found


def kind(pid: int, driver: int) -> str:
    """driver, worker, idle (a worker process that Ray keeps ready) or daemon."""
    if pid == driver:
        return "driver"
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return "daemon"
    if command.startswith("ray::"):  # Ray names its agents so too
        return "idle" if "IDLE" in command else "daemon" if "Agent" in command else "worker"
    return "daemon" if any(word in command for word in DAEMONS) else "worker"


def moved(pid: int) -> Bytes | None:
    """What one process has read and written so far (rchar, wchar), or None if it is gone."""
    try:
        lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return Bytes(int(lines["rchar"]), int(lines["wchar"]))


def pss_bytes(pid: int) -> int:
    """Resident memory of one process with shared pages divided among those that share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _look(root: int, seen: _Seen, *, with_pss: bool) -> None:
    table = processes()
    sizes = dict.fromkeys(("driver", "worker", "idle", "total"), 0)
    ours = {}
    for pid in descendants(root, table):
        stat, of = table[pid], kind(pid, root)
        key = (pid, stat.started)
        seen.cpu[key] = stat.cpu_seconds
        if of == "daemon":
            seen.daemons.add(key)
            continue
        seen.daemons.discard(key)  # Ray names a worker only after it has started
        sizes[of] += stat.rss_bytes
        seen.largest_worker = max(seen.largest_worker, stat.rss_bytes if of == "worker" else 0)
        sizes["total"] += stat.rss_bytes
        bytes_ = moved(pid)
        if bytes_ is not None:
            ours[key] = bytes_
            if stat.parent in table:
                seen.parents[key] = (stat.parent, table[stat.parent].started)
    _forget_the_reaped(seen, ours)
    seen.moved |= ours
    if sizes["total"] > seen.peak["total"]:
        seen.peak = sizes
    if with_pss:
        seen.pss_bytes = max(seen.pss_bytes, sum(pss_bytes(pid) for pid, _ in ours))


def _forget_the_reaped(seen: _Seen, ours: Mapping[tuple[int, int], Bytes]) -> None:
    """Drop processes that have ended and whose bytes are in their parent's since this look.

    A parent that never waits (it ignores SIGCHLD) gets nothing added: its count did not grow by as much.
    """
    for key in [key for key in seen.moved if key not in ours]:
        parent = seen.parents.get(key)
        if parent not in ours or parent not in seen.moved:
            continue
        had, now, gone = seen.moved[parent], ours[parent], seen.moved[key]
        if now.read - had.read >= gone.read and now.written - had.written >= gone.written:
            del seen.moved[key]


def watch(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    pss: bool = False,
    interval_seconds: float = INTERVAL_SECONDS,
) -> Cost:
    """Run a command to its end.

    Args:
        command: its stdout is dropped, its stderr is shown if it fails.
        environment: added to this process's own.
        pss: read PSS too; it costs CPU time that the command then lacks.
        interval_seconds: between two looks.

    Raises:
        SystemExit: it failed.
    """
    seen, ticks = _Seen(), 0
    with tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, **(environment or {})}
        )
        try:
            pid, status = 0, 0
            while not pid:
                _look(process.pid, seen, with_pss=pss and ticks % PSS_EVERY == 0)
                ticks += 1
                time.sleep(interval_seconds)
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            seconds = time.monotonic() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            errors.seek(0)
            tail = errors.read().decode("utf-8", "replace")[-STDERR_TAIL:]
            raise SystemExit(f"{' '.join(command)} exited {process.returncode}\n{tail}")
    daemon_cpu = sum(seen.cpu[key] for key in seen.daemons)
    waited = usage.ru_utime + usage.ru_stime
    return Cost(
        seconds=seconds,
        cpu_seconds=max(sum(seen.cpu.values()), waited),
        daemon_cpu_seconds=daemon_cpu,
        peak_bytes=seen.peak,
        largest_worker_bytes=seen.largest_worker,
        pss_bytes=seen.pss_bytes,
        moved=Bytes(sum(b.read for b in seen.moved.values()), sum(b.written for b in seen.moved.values())),
    )
