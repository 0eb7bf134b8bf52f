"""A slow line in front of a server: one port per client, each with its own bandwidth and latency.

    python benchmarks/throttle.py --to 127.0.0.1:8333 --clients 9 --rate 1e6 --latency 0.02 [--total 4e6] [--free 1]
                                  [--listen 127.0.0.1]

Prints the ports as a JSON list, then answers every line on stdin with the counts so far (JSON: per port bytes down,
bytes up, requests), and ends when stdin does. It forwards bytes and reads no protocol, so signatures and checksums
stay valid. What is simulated:

* rate: bytes per second of one port and direction, over all its connections; the first `--free` ports have none.
* total: bytes per second of all limited ports together and per direction: what the store can do.
* latency: a request is held back so long; a request begins where a connection turns from answering to asking.

Scaling.py runs it as a process of its own, so that its work is not on any worker's account.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass, field

CHUNK_BYTES = 16 * 1024  # at 1 MB/s one chunk takes 16 ms


@dataclass
class Pipe:
    """Bytes per second through one direction of one port, or of the whole store; 0 is no limit."""

    rate: float
    free_at: float = 0.0

    def book(self, n_bytes: int, now: float) -> float:
        """When `n_bytes` that are there now have gone through."""
        if not self.rate:
            return now
        self.free_at = max(self.free_at, now) + n_bytes / self.rate
        return self.free_at


@dataclass
class Port:
    """One client's line: `down` is towards the client."""

    down: tuple[Pipe, Pipe]
    up: tuple[Pipe, Pipe]
    counts: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0, "requests": 0})


class Line:
    """One connection of a client: two directions and whose turn it is."""

    def __init__(self, port: Port, latency_seconds: float) -> None:
        self._port, self._latency = port, latency_seconds
        self._answering = True

    async def carry(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one direction until it ends."""
        pipes = self._port.up if way == "up" else self._port.down
        loop = asyncio.get_running_loop()
        try:
            while data := await reader.read(CHUNK_BYTES):
                self._port.counts[way] += len(data)
                if way == "down":
                    self._answering = True
                elif self._answering:
                    self._answering = False
                    self._port.counts["requests"] += 1
                    await asyncio.sleep(self._latency)
                due = max(pipe.book(len(data), loop.time()) for pipe in pipes)
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            with contextlib.suppress(ConnectionError):
                writer.close()


async def serve(to: str, listen_on: str, ports: list[Port], latency_seconds: float) -> None:
    """Listen on one new port per client until stdin ends."""
    host, _, port = to.rpartition(":")

    async def listen(client: Port) -> asyncio.Server:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            server_reader, server_writer = await asyncio.open_connection(host, int(port))
            line = Line(client, latency_seconds)
            await asyncio.gather(
                line.carry("up", reader, server_writer), line.carry("down", server_reader, writer)
            )

        return await asyncio.start_server(connected, listen_on, 0)

    servers = [await listen(client) for client in ports]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps([client.counts for client in ports]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--listen", default="127.0.0.1", metavar="HOST", help="address that clients reach")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--free", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--total", type=float, default=0.0)
    parser.add_argument("--latency", type=float, default=0.0)
    given = parser.parse_args()
    store_down, store_up, none = Pipe(given.total), Pipe(given.total), Pipe(0)
    ports = [
        Port((none, none), (none, none))
        if index < given.free
        else Port((Pipe(given.rate), store_down), (Pipe(given.rate), store_up))
        for index in range(given.clients)
    ]
    asyncio.run(serve(given.to, given.listen, ports, given.latency))


if __name__ == "__main__":
    main()
