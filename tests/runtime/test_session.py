import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from driver_process import TESTS, end, kill, python, still_alive, wait_for

from ray_merge.errors import Refusal
from ray_merge.runtime.session import open_session

pytestmark = pytest.mark.ray


def end_two_clusters() -> dict[str, Any]:
    """Two drivers at once; one is stopped by SIGTERM, then the other by SIGKILL."""
    folders = [Path(f"/tmp/rmt-{os.getpid()}-{name}") for name in ("term", "kill")]
    drivers = [python(TESTS / "runtime/embedded_run.py", folder, 600, folder=folder) for folder in folders]
    facts = []
    try:
        facts += [
            wait_for(folder / "facts.json", driver) for folder, driver in zip(folders, drivers, strict=True)
        ]
        drivers[0].send_signal(signal.SIGTERM)
        output, errors = drivers[0].communicate(timeout=30)
        seen = {
            "drivers": [driver.pid for driver in drivers],
            "returncode": drivers[0].returncode,
            "output": output,
            "errors": errors,
            "alive after SIGTERM": len(still_alive(facts[0]["pids"], 10)),
            "folder after SIGTERM": Path(facts[0]["folders"][0]).exists(),
            "token after SIGTERM": Path(folders[0], ".ray").exists(),
        }
        # What could still work ends at once; Ray's two agents look for their dead GCS for another minute.
        names = {pid: psutil.Process(pid).name() for pid in facts[1]["pids"]}
        drivers[1].kill()
        working = [pid for pid, name in names.items() if not name.endswith("Agent")]
        return {**seen, "facts": facts, "alive after SIGKILL": len(still_alive(working, 20))}
    finally:
        kill(pid for fact in facts for pid in fact["pids"])
        end(drivers, folders)


@pytest.mark.slow
@pytest.mark.own_process(work=end_two_clusters)
def test_two_embedded_clusters_do_not_meet_and_leave_nothing_however_they_end(answer):
    seen, facts = answer, answer["facts"]
    assert [fact["value"] for fact in facts] == seen["drivers"]
    assert [fact["nodes"] for fact in facts] == [1, 1]
    assert facts[0]["address"] != facts[1]["address"]
    assert not set(facts[0]["pids"]) & set(facts[1]["pids"])
    assert all(len(fact["pids"]) >= 3 for fact in facts)  # GCS, raylet, worker at least
    assert [len(fact["folders"]) for fact in facts] == [1, 1]

    assert seen["returncode"] == 1
    assert "stopped by SIGTERM" in seen["errors"].splitlines()[-1]
    assert seen["output"] == ""
    assert seen["alive after SIGTERM"] == 0
    assert not seen["folder after SIGTERM"]
    assert not seen["token after SIGTERM"]  # none is left for the next `ray start` to find
    assert seen["alive after SIGKILL"] == 0


def test_a_ray_that_is_there_already_is_used_and_left_running(ray_session):
    import ray

    with open_session("local") as inner:
        assert not inner.embedded
    assert ray.is_initialized()
    assert ray_session.embedded


def test_a_ray_client_address_is_refused_with_the_way_to_submit():
    with pytest.raises(Refusal, match="ray job submit"):
        open_session("ray://head:10001")


@pytest.mark.parametrize("address", ["somewhere", "host:", ":6379", "host:port", ""])
def test_an_address_of_no_known_form_is_refused(address):
    with pytest.raises(Refusal, match="none of local, auto, HOST:PORT"):
        open_session(address)


def test_a_dead_address_is_refused_soon_with_the_next_step():
    with socket.socket() as reserved:  # bound, not listening: nothing answers there
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(Refusal, match=f"{address}.*RAY_AUTH_MODE"):
            open_session(address)
    assert time.monotonic() - started < 15


def test_shared_tensor_memory_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")
    with pytest.raises(Refusal, match="RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"):
        open_session("local")


NO_CLUSTER = """
import sys
from ray_merge.errors import Refusal
from ray_merge.runtime.session import open_session
try:
    open_session(sys.argv[1])
except Refusal as refusal:
    print(refusal)
"""


def test_auto_without_a_cluster_and_a_port_that_is_no_ray_are_refused():
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    folder = Path(f"/tmp/rmt-{os.getpid()}-none")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        addresses = ["auto", f"127.0.0.1:{server.server_port}"]
        drivers = [
            python("-c", NO_CLUSTER, address, folder=folder / str(index), RAY_AUTH_MODE="disabled")
            for index, address in enumerate(addresses)
        ]
        try:
            for driver, address in zip(drivers, addresses, strict=True):
                output, errors = driver.communicate(timeout=60)
                assert f"at {address}" in output, errors
                assert "--address local" in output
        finally:
            server.shutdown()
            end(drivers, [folder])
