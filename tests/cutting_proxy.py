"""A proxy in front of a head's dashboard that closes streams of logs, as load balancers do, and can go away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from aiohttp import web


class CuttingProxy:
    """Hands requests on; the first `cuts` log streams are closed with code 1000 after their first text."""

    def __init__(self, target: str, cuts: int) -> None:
        self.target = target
        self.cuts = cuts
        self.streams = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._end: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def close(self) -> None:
        """Nobody answers from now on."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        self._ready.set()
        await self._end.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        async with aiohttp.ClientSession() as session:
            if request.path.endswith("/logs/tail"):
                return await self._stream(request, session)
            async with session.request(
                request.method,
                self.target + request.path_qs,
                data=await request.read(),
                headers={"Content-Type": request.headers.get("Content-Type", "application/json")},
            ) as answer:
                return web.Response(
                    status=answer.status, body=await answer.read(), content_type=answer.content_type
                )

    async def _stream(self, request: web.Request, session: aiohttp.ClientSession) -> web.StreamResponse:
        self.streams += 1
        cut = self.streams <= self.cuts
        near = web.WebSocketResponse()
        await near.prepare(request)
        async with session.ws_connect(self.target + request.path_qs) as far:
            async for message in far:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                await near.send_str(message.data)
                if cut:
                    break
            await near.close(code=aiohttp.WSCloseCode.OK)  # before the far side, whose goodbye takes seconds
        return near


@contextmanager
def cutting_proxy(target: str, cuts: int) -> Iterator[CuttingProxy]:
    """A running proxy."""
    proxy = CuttingProxy(target, cuts)
    proxy._thread.start()
    proxy._ready.wait()
    try:
        yield proxy
    finally:
        proxy.close()
