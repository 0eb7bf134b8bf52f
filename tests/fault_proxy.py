"""A proxy in front of a real S3 server that breaks chosen requests, as networks and servers do.

The rule sees every request and says what happens to it; everything else passes. The client signs the proxy's
own address as Host, and the server checks the signature against that header, so signatures stay valid.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Call:
    """One request: `target` is path and query, `number` counts all requests from 1."""

    method: str
    target: str
    number: int


@dataclass(frozen=True)
class Reply:
    """Answered by the proxy, never seen by the server."""

    status: int
    code: str


class Drop:
    """The connection breaks before the server sees the request."""


class Lose:
    """The server does it, but its answer never arrives."""


class Hang:
    """No answer until the proxy stops; the server never sees the request."""


class Shorten:
    """The connection breaks in the middle of the answer's body."""


Fault = Reply | Drop | Lose | Hang | Shorten | None


@dataclass
class FaultProxy:
    """`endpoint` is where clients go; `calls` is everything that came; `rule` may be changed at any time."""

    endpoint: str
    rule: Callable[[Call], Fault]
    calls: list[Call] = field(default_factory=list)
    hanging: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    def begin(self, rule: Callable[[Call], Fault]) -> None:
        """Forget what came, let go what hangs, and follow `rule` from now on."""
        self.stopped.set()
        self.rule, self.calls, self.hanging, self.stopped = rule, [], threading.Event(), threading.Event()

    def count(self, method: str, part: str = "") -> int:
        return sum(call.method == method and part in call.target for call in self.calls)


@contextlib.contextmanager
def fault_proxy(endpoint: str, rule: Callable[[Call], Fault] = lambda call: None) -> Iterator[FaultProxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.daemon_threads = True
    proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}", rule)
    server.RequestHandlerClass = _handler(proxy, urlsplit(endpoint).netloc)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


def nth(fault: Fault, method: str, part: str, *numbers: int) -> Callable[[Call], Fault]:
    """A rule: `fault` for the given occurrences (from 1; none given: all) of `method` with `part` in the target."""
    seen = 0
    lock = threading.Lock()

    def rule(call: Call) -> Fault:
        nonlocal seen
        if call.method != method or part not in call.target:
            return None
        with lock:
            seen += 1
            return fault if not numbers or seen in numbers else None

    return rule


def _handler(proxy: FaultProxy, server: str) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):  # the client was killed or gave up
                super().handle_one_request()

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                call = Call(self.command, self.path, len(proxy.calls) + 1)
                proxy.calls.append(call)
            fault = proxy.rule(call)
            if isinstance(fault, Hang):
                stopped = proxy.stopped
                proxy.hanging.set()
                stopped.wait()
            if isinstance(fault, Drop | Hang):
                self.close_connection = True
            elif isinstance(fault, Reply):
                text = f"<Error><Code>{fault.code}</Code><Message>made by the test</Message></Error>".encode()
                self.answer(fault.status, [("Content-Type", "application/xml")], text)
            else:
                self.forward(body, fault)

        def forward(self, body: bytes, fault: Fault) -> None:
            connection = http.client.HTTPConnection(server, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            data = response.read()
            connection.close()
            if isinstance(fault, Lose):
                self.close_connection = True
                return
            headers = [
                (k, v)
                for k, v in response.getheaders()
                if k.lower() not in {"connection", "transfer-encoding"}
            ]
            self.answer(response.status, headers, data, cut=isinstance(fault, Shorten))

        def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            names = {name.lower() for name, _ in headers}
            for name, value in headers:
                self.send_header(name, value)
            if "content-length" not in names:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = self.close_connection or cut

        def log_message(self, format: str, *args: object) -> None:
            pass

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.relay)
    return Handler
