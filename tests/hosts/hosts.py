"""Hosts on one machine: process trees with their own network, process space, /dev/shm, /tmp and name.

Everything here runs below `apart` (see below): namespaces without names, that live as long as the processes in them.
So nothing has to be taken down, and nothing is left, however the whole ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

import psutil

TAG = "RAY_MERGE_HOSTS"
"""In the environment of every process in here; its value is the folder of the run."""

REPOSITORY = Path(__file__).parents[2]

BRIDGE = "10.77.0.254"
"""Of this side, for hosts on the bridge."""

GATE = "10.78.0.1"
"""Of this side, for the host outside, which reaches nothing else."""

OUTSIDE = "10.78.0.2"

NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

HOST_SCRIPT = """
set -e
root=$1; name=$2; shift 2
mkdir -p "$root"
mount -t tmpfs tmpfs "$root"
for kept in "$@"; do mkdir -p "$root/${kept#/tmp/}"; mount --rbind "$kept" "$root/${kept#/tmp/}"; done
mkdir -p "$root/home"
mount --rbind "$root" /tmp
mount -t tmpfs tmpfs /dev/shm
echo "$name" > /proc/sys/kernel/hostname
ip link set lo up
echo ready
while :; do sleep 3600 & wait $!; done
"""
"""Process 1 of a host: it makes the private folders, then only takes in orphans. The arguments that follow the name
are folders below /tmp that a host must see: the Python of this run, this repository."""


def why_not() -> str:
    """What is missing for hosts on this machine; empty when nothing is."""
    if os.geteuid() != 0:
        return "namespaces need root"
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"no program {missing[0]}"
    tried = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"unshare: {tried.stderr.strip()}"


def apart(script: Path, words: Sequence[str]) -> int:
    """Run `script --inside FOLDER WORDS` as process 1 of namespaces of its own, and return its exit code.

    When it ends, or this process does (also by SIGKILL), the kernel ends every process in there, and with them go
    the networks; the folder is removed.
    """
    folder = tempfile.mkdtemp(prefix="rmhosts-", dir="/tmp")
    command = ["unshare", *NAMESPACES, sys.executable, str(script), "--inside", folder, *words]
    signal.signal(signal.SIGTERM, _stop)
    process = subprocess.Popen(command, env={**os.environ, TAG: folder}, preexec_fn=_die_with_parent)
    try:
        return process.wait()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG is 1 in <sys/prctl.h>


class Host:
    """A running host; `Hosts.add` makes it.

    Args:
        name: which `hostname` says.
        address: its IP address.
        holder: the `unshare` whose child is process 1.
    """

    def __init__(self, name: str, address: str, holder: subprocess.Popen[str]) -> None:
        self.name, self.address, self._holder = name, address, holder
        self.init = psutil.Process(holder.pid).children()[0].pid

    def start(self, words: Sequence[str], environment: Mapping[str, str], **options: Any) -> subprocess.Popen:
        """Start a program in this host, in its /tmp; what is returned is the `nsenter` before it."""
        enter = ["nsenter", "--target", str(self.init), "--net", "--mount", "--pid", "--uts"]
        command = [*enter, "env", "--chdir=/tmp", *words]
        return subprocess.Popen(command, env={**environment, TAG: os.environ[TAG]}, **options)

    def lose(self) -> None:
        """As when its power fails: no packet leaves any more, and then every process is killed."""
        _ip("link", "del", self.wire)
        os.kill(self.init, signal.SIGKILL)
        self._holder.wait()

    @property
    def wire(self) -> str:
        """This side's end of its cable."""
        return f"to-{self.address.replace('.', '')}"[:15]


class Hosts:
    """A context manager: a bridge for hosts, and hosts until its end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0
        self._holders: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "bridge", "type", "bridge")
        _ip("addr", "add", f"{BRIDGE}/24", "dev", "bridge")
        _ip("link", "set", "bridge", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self._holders:
            holder.kill()  # process 1 dies with it, and the kernel ends the rest
            holder.wait()

    def add(self, name: str, address: str) -> Host:
        """A host on the bridge."""
        host = self._host(name, address)
        _ip("link", "set", host.wire, "master", "bridge", "up")
        return host

    def add_outside(self, name: str) -> Host:
        """A host that is not on the bridge: it reaches this side alone, at GATE."""
        host = self._host(name, OUTSIDE)
        _ip("addr", "add", f"{GATE}/24", "dev", host.wire)
        _ip("link", "set", host.wire, "up")
        return host

    def _host(self, name: str, address: str) -> Host:
        self._made += 1
        root = self._folder / f"host{self._made}"
        kept = sorted(
            {path for path in (sys.prefix, sys.base_prefix, str(REPOSITORY)) if path.startswith("/tmp/")}
        )
        script = ["bash", "-c", HOST_SCRIPT, "host", str(root), name, *kept]
        with (self._folder / f"host{self._made}.log").open("w") as log:
            holder = subprocess.Popen(
                ["unshare", "--uts", *NAMESPACES, *script],
                stdout=subprocess.PIPE,
                stderr=log,  # unshare itself complains when its child is killed
                stdin=subprocess.DEVNULL,
                text=True,
            )
        self._holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n", f"host {name} did not come up"
        host = Host(name, address, holder)
        _ip("link", "add", host.wire, "type", "veth", "peer", "name", "eth0", "netns", str(host.init))
        inside = ("nsenter", "--target", str(host.init), "--net")
        _ip("addr", "add", f"{address}/24", "dev", "eth0", inside=inside)
        _ip("link", "set", "eth0", "up", inside=inside)
        return host


def _ip(*words: str, inside: Sequence[str] = ()) -> None:
    done = subprocess.run([*inside, "ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
