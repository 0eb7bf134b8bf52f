"""One contender does one piece of work against an S3 store, in a process of its own, and tells what it cost.

    python benchmarks/s3_contenders.py CONTENDER WORK JOB.json

Started by s3_speed.py, by hand only to look into a figure. JOB holds `bucket`, `key`, `file` (the object's bytes on
this disk), `folder` (for what is downloaded) and `spans` (the ranges of every work that reads ranges). Endpoint and
credentials come from the environment. Prints one JSON object: seconds, cpu_seconds (of this process), n_bytes (asked
for), grown_bytes (peak resident memory above what the process held before the work).

Before the clock starts, everything is imported, the client is made and has answered one HEAD. Downloads are timed until
the file is fsynced. Bytes are touched, not compared: s3_speed.py compares what was downloaded and uploaded once.
"""

# ruff: noqa: D102 (Client says what the methods do)
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

Job = dict[str, Any]
Spans = Sequence[tuple[int, int]]
THREADS = 16  # of boto3 and pyarrow, which bring none of their own for ranges; 8 and 32 were no faster


class Client(Protocol):
    """What s3_speed.py compares."""

    def download(self, target: Path) -> None:
        """The object as a new file."""

    def upload(self, source: Path, key: str) -> None:
        """The file as a new object."""

    def ranges(self, spans: Spans) -> Sequence[bytes]:
        """The bytes of each span, all of them in memory at the end."""


class Ours:
    """The store that the package opens."""

    def __init__(self, job: Job) -> None:
        from ray_merge.storage.store import open_store

        self.store = open_store(f"s3://{job['bucket']}")
        self.key = job["key"]
        self.store.info(self.key)

    def download(self, target: Path) -> None:
        self.store.download(self.key, target)

    def upload(self, source: Path, key: str) -> None:
        assert self.store.put_if_absent(key, source, {"sha256": "0" * 64})

    def ranges(self, spans: Spans) -> Sequence[bytes]:
        return self.store.read_ranges(self.key, spans)

    def stream(self, spans: Spans) -> int:
        """As a merge reads its base: in chunks, a few ahead (storage/stream.py)."""
        from ray_merge.storage.stream import CHUNK_BYTES, Reader

        cut = [(a, min(a + CHUNK_BYTES, end)) for start, end in spans for a in range(start, end, CHUNK_BYTES)]
        with Reader(self.store) as reader:
            return sum(map(len, reader.stream([(self.key, *span) for span in cut])))


class S3fs:
    """s3fs with its own settings."""

    def __init__(self, job: Job) -> None:
        import s3fs

        self.fs = s3fs.S3FileSystem()
        self.bucket, self.path = job["bucket"], f"{job['bucket']}/{job['key']}"
        self.fs.info(self.path)

    def download(self, target: Path) -> None:
        self.fs.get_file(self.path, str(target))

    def upload(self, source: Path, key: str) -> None:
        self.fs.put_file(str(source), f"{self.bucket}/{key}")

    def ranges(self, spans: Spans) -> Sequence[bytes]:
        starts, ends = zip(*spans, strict=True)
        return self.fs.cat_ranges([self.path] * len(spans), [*starts], [*ends])


class Boto3:
    """boto3 with its own settings; ranges on threads."""

    def __init__(self, job: Job) -> None:
        import boto3
        from botocore.config import Config

        self.client = boto3.client("s3", config=Config(max_pool_connections=32))
        self.bucket, self.key = job["bucket"], job["key"]
        self.client.head_object(Bucket=self.bucket, Key=self.key)

    def download(self, target: Path) -> None:
        self.client.download_file(self.bucket, self.key, str(target))

    def upload(self, source: Path, key: str) -> None:
        self.client.upload_file(str(source), self.bucket, key)

    def ranges(self, spans: Spans) -> Sequence[bytes]:
        return on_threads(self.get, spans)

    def get(self, span: tuple[int, int]) -> bytes:
        asked = f"bytes={span[0]}-{span[1] - 1}"
        return self.client.get_object(Bucket=self.bucket, Key=self.key, Range=asked)["Body"].read()


class Pyarrow:
    """pyarrow's S3 client (C++), told what it needs."""

    def __init__(self, job: Job) -> None:
        from pyarrow.fs import S3FileSystem

        scheme, _, address = os.environ["AWS_ENDPOINT_URL"].partition("://")
        self.fs = S3FileSystem(endpoint_override=address, scheme=scheme, region=os.environ["AWS_REGION"])
        self.bucket, self.path = job["bucket"], f"{job['bucket']}/{job['key']}"
        self.file = self.fs.open_input_file(self.path)

    def download(self, target: Path) -> None:
        size, piece = self.file.size(), 8 << 20
        with open(target, "wb") as out:

            def get(start: int) -> int:
                return os.pwrite(out.fileno(), self.file.read_at(min(piece, size - start), start), start)

            on_threads(get, range(0, size, piece))

    def upload(self, source: Path, key: str) -> None:
        with open(source, "rb") as file, self.fs.open_output_stream(f"{self.bucket}/{key}") as out:
            while data := file.read(8 << 20):
                out.write(data)

    def ranges(self, spans: Spans) -> Sequence[bytes]:
        return on_threads(lambda span: self.file.read_at(span[1] - span[0], span[0]), spans)


class Awscli:
    """The `aws` program of the same Python; its start is part of the figure."""

    def __init__(self, job: Job) -> None:
        self.program = Path(sys.executable).with_name("aws")
        self.bucket, self.key = job["bucket"], job["key"]

    def download(self, target: Path) -> None:
        self.copy(f"s3://{self.bucket}/{self.key}", target)

    def upload(self, source: Path, key: str) -> None:
        self.copy(source, f"s3://{self.bucket}/{key}")

    def copy(self, source: str | Path, target: str | Path) -> None:
        command = [self.program, "s3", "cp", "--only-show-errors", source, target]
        subprocess.run(command, check=True)


CONTENDERS = {"ours": Ours, "s3fs": S3fs, "boto3": Boto3, "pyarrow": Pyarrow, "awscli": Awscli}


def on_threads(call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return [*pool.map(call, items)]


def download(client: Any, job: Job) -> int:
    target = Path(job["folder"]) / "downloaded"
    client.download(target)
    with open(target, "rb") as file:  # ours has done so; for the others it makes the same promise
        os.fsync(file.fileno())
    return target.stat().st_size


def upload(client: Any, job: Job) -> int:
    client.upload(Path(job["file"]), f"uploaded/{uuid.uuid4().hex}")
    return Path(job["file"]).stat().st_size


def read(client: Any, job: Job, work: str) -> int:
    spans = [(start, end) for start, end in job["spans"][work]]
    if work == "merge order" and hasattr(client, "stream"):
        return client.stream(spans)
    return sum(map(len, client.ranges(spans)))


def measure(client: Any, job: Job, work: str) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is the imports'
    held = memory_bytes("VmRSS")
    started, cpu = time.perf_counter(), cpu_seconds()
    whole = {"download": download, "upload": upload}.get(work)
    n_bytes = whole(client, job) if whole else read(client, job, work)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu_seconds() - cpu,
        "n_bytes": n_bytes,
        "grown_bytes": memory_bytes("VmHWM") - held,
    }


def memory_bytes(name: str) -> int:
    """From /proc; ru_maxrss would begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    contender, work, job = sys.argv[1:]
    described = json.loads(Path(job).read_text())
    print(json.dumps(measure(CONTENDERS[contender](described), described, work)))


if __name__ == "__main__":
    main()
