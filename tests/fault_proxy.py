"""A proxy in front of a real S3 server that breaks chosen requests, as networks and servers do.

The rule sees every request and says what happens to it; everything else passes. The client signs the proxy's
own address as Host, and the server checks the signature against that header, so signatures stay valid.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
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
    """The connection ends in the middle of the answer's body, as after a time-out of a load balancer."""


class Reset:
    """The connection is reset (RST) in the middle of the answer's body: a server that was killed."""


class CutRequest:
    """The connection is reset in the middle of the request's body, on both sides: a client or a cable that died."""


class Halve:
    """Half of the answer's body under a Content-Length that fits it: a truncated answer that looks whole."""


@dataclass(frozen=True)
class Delay:
    """The answer takes `seconds` longer."""

    seconds: float


@dataclass(frozen=True)
class Drip:
    """The answer's body comes byte by byte, one every `seconds`, so that no wait for the next one is long."""

    seconds: float


class Shift:
    """A range of the same length from another place, and an answer that says so: a proxy that mixes up its cache."""


class Stale:
    """The answer that the same request got when it came first; the first one passes."""


Fault = (
    Reply | Drop | Lose | Hang | Shorten | Reset | CutRequest | Halve | Delay | Drip | Shift | Stale | None
)


@dataclass
class FaultProxy:
    """`endpoint` is where clients go; `calls` is everything that came; `rule` may be changed at any time."""

    endpoint: str
    rule: Callable[[Call], Fault]
    calls: list[Call] = field(default_factory=list)
    earlier: dict[str, tuple[int, list[tuple[str, str]], bytes]] = field(default_factory=dict)
    hanging: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    def begin(self, rule: Callable[[Call], Fault]) -> None:
        """Forget what came, let go what hangs, and follow `rule` from now on."""
        self.stopped.set()
        self.rule, self.calls, self.hanging, self.stopped = rule, [], threading.Event(), threading.Event()
        self.earlier = {}

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


Answer = tuple[int, list[tuple[str, str]], bytes]


def _ask(server: str, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
    connection = http.client.HTTPConnection(server, timeout=30)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        kept = [(k, v) for k, v in response.getheaders() if k.lower() not in _OF_ONE_HOP]
        return response.status, kept, response.read()
    finally:
        connection.close()


def _shifted(range_header: str) -> str:
    """`bytes=100-199` -> `bytes=84-183`; from the beginning of an object one byte further."""
    first, last = map(int, re.findall(r"\d+", range_header))
    by = -min(16, first) or 1
    return f"bytes={first + by}-{last + by}"


_OF_ONE_HOP = {"connection", "transfer-encoding"}


def _send_and_reset(server: str, method: str, path: str, headers: Any, body: bytes) -> None:
    """Half a request: all headers, the first half of the body, and then RST."""
    host, _, port = server.partition(":")
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items() if k.lower() != "expect")]
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _handler(proxy: FaultProxy, server: str) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Headers and body are two writes: with Nagle's algorithm the second waits 40 ms for an acknowledgement.
        disable_nagle_algorithm = True

        def handle_one_request(self) -> None:
            # The client was killed or gave up, or the server behind is away: both connections just end.
            try:
                super().handle_one_request()
            except (OSError, http.client.HTTPException, ValueError):
                self.close_connection = True

        def relay(self) -> None:
            with lock:
                call = Call(self.command, self.path, len(proxy.calls) + 1)
                proxy.calls.append(call)
            fault = proxy.rule(call)
            n_bytes = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(n_bytes // 2 if isinstance(fault, CutRequest) else n_bytes)
            if isinstance(fault, Hang):
                stopped = proxy.stopped
                proxy.hanging.set()
                stopped.wait()
            if isinstance(fault, Delay):
                proxy.stopped.wait(fault.seconds)
            if isinstance(fault, Drop | Hang):
                self.close_connection = True
            elif isinstance(fault, CutRequest):
                _send_and_reset(server, self.command, self.path, self.headers, body)
                self.reset()
            elif isinstance(fault, Reply):
                text = f"<Error><Code>{fault.code}</Code><Message>made by the test</Message></Error>".encode()
                self.answer(fault.status, [("Content-Type", "application/xml")], text)
            else:
                self.forward(body, fault)

        def forward(self, body: bytes, fault: Fault) -> None:
            asked = dict(self.headers)
            if isinstance(fault, Shift):
                asked = {
                    name: _shifted(value) if name.lower() == "range" else value
                    for name, value in asked.items()
                }
            status, headers, data = _ask(server, self.command, self.path, asked, body)
            if self.command == "GET" and data:
                status, headers, data = self.remember((status, headers, data), isinstance(fault, Stale))
            if isinstance(fault, Lose):
                self.close_connection = True
                return
            if isinstance(fault, Halve):
                data = data[: len(data) // 2]
                headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            self.answer(status, headers, data, fault)

        def remember(self, answer: Answer, old: bool) -> Answer:
            with lock:
                first = proxy.earlier.setdefault(self.path, answer) if "list-type=2" in self.path else answer
            return first if old else answer

        def answer(
            self, status: int, headers: list[tuple[str, str]], data: bytes, fault: Fault = None
        ) -> None:
            self.send_response_only(status)
            names = {name.lower() for name, _ in headers}
            for name, value in headers:
                self.send_header(name, value)
            if "content-length" not in names:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":  # a body would be taken for the next answer
                return
            cut = isinstance(fault, Shorten | Reset)
            if isinstance(fault, Drip):
                self.drip(data, fault.seconds)
                return
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = self.close_connection or cut
            if isinstance(fault, Reset):
                self.reset()

        def drip(self, data: bytes, seconds: float) -> None:
            stopped = proxy.stopped
            self.close_connection = True
            for byte in data:
                self.wfile.write(bytes([byte]))
                if stopped.wait(seconds):
                    return

        def reset(self) -> None:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # shutdown() of the library would send a FIN first; the descriptor closed with a linger of 0 sends RST.
            self.connection.close()

        def log_message(self, format: str, *args: object) -> None:
            pass

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.relay)
    return Handler
