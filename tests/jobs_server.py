"""A head's Jobs API whose jobs do nothing but talk, as fast as they can: for what a real head shows only by chance."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from aiohttp import web


class JobsServer:
    """The requests that `JobsApi` makes; `jobs` are those that there are, `status` is that of new ones."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.status = "RUNNING"
        self.url = ""

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": ""})

    async def package(self, request: web.Request) -> web.Response:
        return web.Response()  # it is there already

    async def submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = asked["submission_id"]
        self.jobs[name] = {
            **{key: asked[key] for key in ("submission_id", "entrypoint", "metadata")},
            "type": "SUBMISSION",
            "status": self.status,
        }
        return web.json_response({"job_id": name, "submission_id": name})

    async def state(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["name"])
        return web.Response(status=404) if job is None else web.json_response(job)

    async def stop(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["name"]]["status"] = "STOPPED"
        return web.json_response({"stopped": True})

    async def log(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": ""})

    async def stream(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        try:
            while self.jobs[request.match_info["name"]]["status"] == "RUNNING":
                for _ in range(50):
                    await socket.send_str("unit done\n")
                await asyncio.sleep(0.0005)
        except ConnectionError:  # the reader went away
            pass
        return socket

    async def serve(self, ready: threading.Event, end: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_get("/api/version", self.version)
        app.router.add_get("/api/packages/{protocol}/{package}", self.package)
        app.router.add_post("/api/jobs/", self.submit)
        app.router.add_get("/api/jobs/{name}", self.state)
        app.router.add_post("/api/jobs/{name}/stop", self.stop)
        app.router.add_get("/api/jobs/{name}/logs", self.log)
        app.router.add_get("/api/jobs/{name}/logs/tail", self.stream)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        ready.set()
        await end.wait()
        await runner.cleanup()


@contextmanager
def jobs_server() -> Iterator[JobsServer]:
    """A running one."""
    server, ready, loop, end = JobsServer(), threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(ready, end),))
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()
