"""Ways from the host outside to one port of the cluster, which can cut the streams of logs that pass."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

STREAM = b"/logs/tail"


class Door:
    """Forwards bytes of TCP connections and reads no more of them than the first line.

    The next `cuts` streams of logs are reset behind their first text: not even a goodbye of the protocol arrives.

    Args:
        listen: HOST, of this side.
        to: (host, port), of the server.
    """

    def __init__(self, listen: str, to: tuple[str, int]) -> None:
        self._to = to
        self.cuts = 0
        self.made = 0
        self._socket = socket.create_server((listen, 0))
        self.address = f"{listen}:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), daemon=True)
        self._thread.start()

    def cut(self, times: int) -> None:
        """Cut the next so many streams; the count of those that were cut begins again."""
        self.cuts, self.made = times, 0

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, sock=self._socket)
        await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(*self._to)
            first = await reader.read(65536)
            far_writer.write(first)
            is_stream = STREAM in first.split(b"\r\n", 1)[0]
            await asyncio.gather(
                _carry(reader, far_writer), self._answer(far_reader, writer, cut=is_stream and self._take())
            )
        writer.transport.abort()

    def _take(self) -> bool:
        """Whether this stream is one to cut."""
        self.cuts -= 1
        return self.cuts >= 0

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cut: bool) -> None:
        if cut:
            writer.write(await reader.readuntil(b"\r\n\r\n"))  # the protocol's change to a websocket
            writer.write(await reader.read(65536))
            with contextlib.suppress(OSError):
                await writer.drain()
            self.made += 1
            raise ConnectionResetError
        await _carry(reader, writer)


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
