"""Joining or starting Ray: the only caller of `ray.init`.

Owns: the embedded cluster of one process (its folder, its token, its end), and the way into a running one.
Never: joins a cluster that was not named. A bare `ray.init()` would take any cluster that it finds on the machine.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.job_config import JobConfig

from ray_merge import logs
from ray_merge.errors import Refusal, RunFailed
from ray_merge.pool import Closing

OBJECT_STORE_BYTES = 100_000_000  # of merges: results are a few hundred bytes, no tensor enters Ray's store
CONNECT_SECONDS = 5.0
CONNECT_TRIES = "3"
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EMPTY_SETTINGS_FRAME = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS = 4
UNUSED_DAEMONS = ("start_api_server", "start_monitor")
LONGEST_FOLDER = 30  # a socket's path takes at most 107 bytes, and Ray's own part of it needs up to 70

logger = logging.getLogger("ray_merge.runtime")


@dataclass
class Session(Closing):
    """A connection to Ray; a context manager that undoes what opening it did, and no more.

    Attributes:
        address: what was asked for.
        embedded: this process started the cluster, and closing the session ends it.
        may_grow: nodes may join the cluster, so a demand that does not fit yet is worth a wait.
    """

    address: str
    embedded: bool
    may_grow: bool
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False)

    def close(self) -> None:
        """Leave the cluster, and end it if it was embedded; a second call does nothing."""
        while self._undo:
            self._undo.pop()()


def open_session(
    address: str,
    *,
    num_cpus: int | None = None,
    object_store_bytes: int | None = None,
    log_level: int = logging.ERROR,
) -> Session:
    """Start an embedded Ray, or join a running one.

    A Ray that this process has initialised already (tests, notebooks) is used as it is and left running.

    Args:
        address: `local` starts an embedded cluster that nothing else can join; `auto` takes the cluster of this
            Ray job or machine; `HOST:PORT` names the GCS of a running cluster.
        num_cpus: logical CPUs of an embedded cluster; default: those of the machine.
        object_store_bytes: room of an embedded cluster for what workers hand on to each other; beyond it Ray spills
            to disk.
        log_level: of Ray's own logging; DEBUG also brings the workers' output to this process.

    Raises:
        Refusal: the address is of the wrong kind, nobody answers there, or its versions do not fit.
    """
    resolved = _resolve(address)
    if os.environ.get("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "0").lower() in ("1", "true"):
        raise Refusal(
            "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS is set: a write to one tensor would reach every reader of it; unset it"
        )
    if ray.is_initialized():
        logger.info("Ray is initialised in this process already; using that instead of %s", address)
        return Session(address, embedded=False, may_grow=address != "local")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    session = Session(address, embedded=address == "local", may_grow=address != "local")
    before = signal.getsignal(signal.SIGTERM)
    try:
        options = (
            _embedded(session, num_cpus, object_store_bytes) if session.embedded else {"address": resolved}
        )
        _init(options, log_level)
    except BaseException:
        session.close()
        raise
    session._undo.append(ray.shutdown)
    _take_back_sigterm(session, before)
    return session


def _resolve(address: str) -> str:
    """Turn an address into `local` or the HOST:PORT of something that answers.

    Ray's own `auto` also searches the machine's processes, and so would join the embedded cluster of any stranger.
    """
    if address == "local":
        return address
    named = _address_of_this_machine() if address == "auto" else address
    if named.startswith("ray://"):
        raise Refusal(
            f"address {named}: Ray Client is not supported, because a run would die with its connection; "
            "submit it instead: "
            "ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/merge.py RECIPE"
        )
    host, _, port = named.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        source = " (from RAY_ADDRESS)" if address == "auto" else ""
        raise Refusal(f"address {named!r}{source} is none of local, auto, HOST:PORT")
    try:
        _check_that_grpc_answers(host.strip("[]"), int(port))
    except OSError as error:
        raise Refusal(f"no Ray cluster answers at {named} ({error}); {_NEXT_STEP}") from error
    return named


def _check_that_grpc_answers(host: str, port: int) -> None:
    """Greet in HTTP/2 and wait for the SETTINGS frame that every gRPC server sends (RFC 9113, 3.4).

    Ray itself tries a dead port, or the dashboard's, for minutes before it gives up.

    Raises:
        OSError: nobody answers within `CONNECT_SECONDS`, or in another language.
    """
    with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        connection.sendall(HTTP2_PREFACE + EMPTY_SETTINGS_FRAME)
        answer = connection.recv(9)
    if len(answer) < 4 or answer[3] != SETTINGS:
        raise OSError(f"what listens there is no gRPC server: it answers {answer!r}")


def _address_of_this_machine() -> str:
    """What `auto` means: the cluster of this Ray job or pod, or the one that `ray start` noted on this machine."""
    named = os.environ.get("RAY_ADDRESS", "")
    if named and named != "auto":
        return named
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    note = Path(folder, "ray", "ray_current_cluster")
    if not note.exists():
        raise Refusal(
            f"no Ray cluster at auto: RAY_ADDRESS is not set and `ray start` has left no {note}; {_NEXT_STEP}"
        )
    return note.read_text().strip()


_NEXT_STEP = (
    "check that the head runs, that the port is its GCS port (6379 by default), and that RAY_AUTH_MODE and the token "
    "are the same here as there; or use --address local"
)


def _embedded(session: Session, num_cpus: int | None, store_bytes: int | None) -> dict[str, Any]:
    """Options of an embedded cluster; its folder is removed when the session closes."""
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="rm-", dir=parent if len(parent) <= LONGEST_FOLDER else "/tmp"))
    session._undo.append(lambda: shutil.rmtree(folder, ignore_errors=True))
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        # Otherwise Ray writes ~/.ray/auth_token, which changes what `ray start` does on this machine from then on.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return {
        "address": "local",
        "num_cpus": num_cpus or os.cpu_count(),
        "include_dashboard": False,
        "object_store_memory": max(OBJECT_STORE_BYTES, store_bytes or 0),
        "_temp_dir": str(folder),
    }


def _init(options: dict[str, Any], log_level: int) -> None:
    verbose = log_level <= logging.DEBUG
    # A GCS that refuses our token is asked 20 times by default.
    patience = {} if options["address"] == "local" else {"RAY_gcs_server_port_wait_time_s": CONNECT_TRIES}
    try:
        embedded = options["address"] == "local"
        with (
            _default_environment(patience),
            _few_daemons() if embedded else nullcontext(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(**options, **_logging(log_level), log_to_driver=verbose)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise Refusal(f"cannot join a Ray cluster at {options['address']} ({error}); {_NEXT_STEP}") from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        text = " ".join(str(error).split())
        raise Refusal(f"{options['address']}: {text}; use the cluster's image for the driver too") from error
    # Ray prints what happens to its processes to stdout, where a command's own output goes.
    # There is no public switch; the pool logs every worker that it loses.
    vars(ray._private.worker)["_worker_logs_enabled"] = verbose


def _logging(log_level: int) -> dict[str, Any]:
    """Options for the lines of Ray: in this process as ours, in the workers JSON where ours are.

    `ray.init(logging_config=...)` would also give this process handlers that write other fields.
    """
    if not logs.is_json():
        return {"logging_level": log_level}
    logs.set_up("json")  # again, for the logger that Ray has made since
    logging.getLogger("ray").setLevel(log_level)
    config = JobConfig()
    config.set_py_logging_config(ray.LoggingConfig(encoding="JSON", additional_log_standard_attrs=["name"]))
    return {"configure_logging": False, "job_config": config}


def _take_back_sigterm(session: Session, before: Any) -> None:
    """Ray's handler exits with 15; a stopped run exits with 1 and says so."""
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise RunFailed("stopped by SIGTERM; run the recipe again to finish it")

    signal.signal(signal.SIGTERM, stop if before in (signal.SIG_DFL, None) else before)
    session._undo.append(lambda: signal.signal(signal.SIGTERM, before or signal.SIG_DFL))


@contextmanager
def _few_daemons() -> Iterator[None]:
    """Leave out the two daemons that a cluster of one machine and one driver has no use for, for one `ray.init`.

    The API server of the dashboard is started even with `include_dashboard=False`, and init waits for it; the
    autoscaler's monitor takes a second to end. Together 2.6 of the 6 s that Ray takes to start and to end on two
    cores. There is no public switch in `ray.init` (`ray start` has --no-monitor).
    """
    node: Any = ray._private.node.Node
    kept = {name: getattr(node, name) for name in UNUSED_DAEMONS if hasattr(node, name)}
    for name in kept:
        setattr(node, name, lambda self, *_, **__: None)
    try:
        yield
    finally:
        for name, start in kept.items():
            setattr(node, name, start)


@contextmanager
def _default_environment(defaults: dict[str, str]) -> Iterator[None]:
    """Set the variables that are not set, for the time of one call."""
    ours = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


__all__ = ["Session", "open_session"]
