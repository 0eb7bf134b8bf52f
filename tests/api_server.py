"""A small HTTP server that answers for RayJobs as a Kubernetes API server does, and fails as one does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RAYJOBS = "/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
JOBS = "/apis/batch/v1/namespaces/{namespace}/jobs"
TOKEN = "a-token"


@dataclass
class ApiServer:
    """What it holds and how it behaves.

    Args:
        states: `status` of a RayJob, one further for each look; the last one stays.
        failures: statuses that the next requests are answered with instead; 0 closes the connection.
        done: called when a job's status is Complete, before that is told.
        token: that requests must bring; empty for none, as behind `kubectl proxy`.
        batch: Jobs of Kubernetes, by name.
    """

    states: Sequence[dict[str, str]] = ()
    failures: list[int] = field(default_factory=list)
    done: Callable[[], None] = lambda: None
    namespace: str = "merging"
    token: str = TOKEN
    batch: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    looks: int = 0

    def answer(self, method: str, path: str, token: str, body: Any) -> tuple[int, dict[str, Any]]:
        """Status and document."""
        self.requests.append(f"{method} {path}")
        if self.failures:
            status = self.failures.pop(0)
            return status, problem(status, "InternalError" if status >= 500 else "Unauthorized")
        if token != (f"Bearer {self.token}" if self.token else ""):
            return 401, problem(401, "Unauthorized")
        folder, name = path, ""
        if method == "GET":
            folder, _, name = path.rpartition("/")
            if folder == JOBS.format(namespace=self.namespace) and name in self.batch:
                return 200, self.batch[name]
        if folder != RAYJOBS.format(namespace=self.namespace):
            return 404, problem(404, "the server could not find the requested resource")
        return self.create(body) if method == "POST" else self.get(name)

    def create(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A new job."""
        if body["kind"] != "RayJob" or "entrypoint" not in body["spec"]:
            return 422, problem(422, 'RayJob.ray.io "x" is invalid: spec.entrypoint: Required value')
        name = body["metadata"]["name"]
        if name in self.jobs:
            return 409, problem(409, f'rayjobs.ray.io "{name}" already exists')
        self.jobs[name] = body
        return 201, body

    def get(self, name: str) -> tuple[int, dict[str, Any]]:
        """A job with its status."""
        if name not in self.jobs:
            return 404, problem(404, f'rayjobs.ray.io "{name}" not found')
        state = self.states[min(self.looks, len(self.states) - 1)] if self.states else {}
        self.looks += 1
        if state.get("jobDeploymentStatus") == "Complete":
            self.done()
        return 200, {**self.jobs[name], "status": state} if state else self.jobs[name]


def problem(status: int, message: str) -> dict[str, Any]:
    """How the API server says no."""
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status}


@contextmanager
def serving(server: ApiServer) -> Iterator[ApiServer]:
    """The server, listening."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond(None)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", "0"))
            self.respond(json.loads(self.rfile.read(length)))

        def respond(self, body: Any) -> None:
            token = self.headers.get("Authorization", "")
            status, document = server.answer(self.command, self.path, token, body)
            if status == 0:
                self.close_connection = True
                return
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
