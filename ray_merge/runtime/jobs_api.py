"""Ray's Jobs API as `submit` needs it: five calls that answer, or raise NoContact, or Refusal for good.

Owns Ray's SDK (which adds the cluster's token to every request) and a limit of time for each call, which the SDK does
not have. Never decides how a job ended: see `ray_merge.submit`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import queue
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ray_merge.contact import NoContact
from ray_merge.errors import RayMergeError, Refusal

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Answer = TypeVar("Answer")

CALL_SECONDS = 60.0
"""Of one request; the longest one sends the folder of job scripts, a few kB."""

SILENT_SECONDS = 5.0
"""A log that says nothing for so long: its job may have ended, and the stream may be dead without saying so."""

CHATTY = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that tell of every upload and every closed stream, in the middle of the job's own log."""

OVERRIDE = "RAY_API_SERVER_ADDRESS"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What the cluster knows of a job.

    Args:
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: of Ray; with the last lines of the log when the job has failed.
        error_type: of Ray, for jobs that did not get as far as a program.
        exit_code: of the program, where there was one.
        metadata: as it was submitted.
    """

    status: str
    message: str = ""
    error_type: str = ""
    exit_code: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether it cannot change any more."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobsApi:
    """The Jobs API of a head.

    Args:
        address: http:// URL of its dashboard.
        contact_seconds: how long it may be silent; no call waits longer than that, or SILENT_SECONDS.
    """

    def __init__(self, address: str, contact_seconds: float = CALL_SECONDS) -> None:
        if not re.match(r"https?://[^/]", address):
            raise Refusal(
                f"--address {address}: give the URL of the head's dashboard, such as http://HEAD:8265 (not the GCS "
                "port, not ray://)"
            )
        self.address = address.rstrip("/")
        self._call_seconds = min(CALL_SECONDS, max(SILENT_SECONDS, contact_seconds))
        self._made: JobSubmissionClient | None = None

    def state(self, name: str) -> JobState | None:
        """Of one job; None when the cluster knows none of that name."""

        def ask() -> JobState | None:
            try:
                found = self._client().get_job_info(name)
            except RuntimeError as error:
                if _status_of(error) == 404:
                    return None
                raise
            return JobState(
                status=str(found.status.value),
                message=found.message or "",
                error_type=found.error_type or "",
                exit_code=found.driver_exit_code,
                metadata=found.metadata or {},
            )

        return self._within(ask)

    def submit(self, name: str, command: str, folder: Path, metadata: dict[str, str]) -> bool:
        """Start `command` in a copy of `folder`; False when a job of that name is there already."""

        def ask() -> bool:
            try:
                self._client().submit_job(
                    entrypoint=command,
                    submission_id=name,
                    runtime_env={"working_dir": str(folder)},
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
            return True

        return self._within(ask)

    def stop(self, name: str) -> None:
        """Ask a job to end; SIGTERM, and three seconds later SIGKILL."""
        self._within(lambda: self._client().stop_job(name))

    def log(self, name: str) -> str:
        """All that a job has printed."""
        return self._within(lambda: self._client().get_job_logs(name))

    def follow(self, name: str) -> Iterator[str | None]:
        """What a job prints, from its beginning, as it comes; None when nothing came for `SILENT_SECONDS`.

        Ends when the stream does, which says nothing about the job.

        Raises:
            NoContact: the stream broke.
        """
        client = self._within(self._client)
        chunks = client.tail_job_logs(name)

        async def one() -> str:
            return await anext(chunks)

        loop = asyncio.new_event_loop()
        # Not in this thread: asyncio drops what a signal raises in the middle of one of its callbacks.
        threading.Thread(target=_turn, args=(loop, chunks), daemon=True, name="ray-merge-log-stream").start()
        waiting: concurrent.futures.Future[str] | None = None
        try:
            while True:
                waiting = waiting or asyncio.run_coroutine_threadsafe(one(), loop)
                done, _ = concurrent.futures.wait({waiting}, timeout=SILENT_SECONDS)
                if not done:
                    yield None
                    continue
                ended, waiting = waiting, None
                yield ended.result()
        except StopAsyncIteration:
            return
        except RayMergeError:  # a signal's
            raise
        except Exception as error:  # aiohttp's and Ray's own, of many kinds: the stream is gone, that is all
            raise NoContact(_words(error)) from error
        finally:
            loop.call_soon_threadsafe(loop.stop)

    def _client(self) -> JobSubmissionClient:
        if self._made is None:
            from ray.job_submission import JobSubmissionClient

            for name in CHATTY:
                logging.getLogger(name).setLevel(logging.WARNING)
            with _address_in_the_environment(self.address):
                self._made = JobSubmissionClient(self.address)
        return self._made

    def _within(self, ask: Callable[[], Answer]) -> Answer:
        """`ask()` in a thread that is left behind when it takes too long."""
        answers: queue.Queue[Answer | BaseException] = queue.Queue()

        def work() -> None:
            try:
                answers.put(ask())
            except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
                answers.put(error)

        threading.Thread(target=work, daemon=True, name="ray-merge-jobs-api").start()
        try:
            answer = answers.get(timeout=self._call_seconds)
        except queue.Empty:
            raise NoContact(f"no answer within {self._call_seconds:.0f} s") from None
        if isinstance(answer, BaseException):
            raise self._judged(answer) from answer
        return answer

    def _judged(self, error: BaseException) -> BaseException:
        """What an error of the SDK means: ask again, or never."""
        if type(error).__name__ == "AuthenticationError":
            return Refusal(
                f"{self.address} refused this client's token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
                f"RAY_AUTH_TOKEN_PATH) as on the cluster: {_words(error)}"
            )
        status = _status_of(error)
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            return Refusal(f"{self.address} refused the request: {_words(error)}")
        if isinstance(
            error, OSError | RuntimeError | ValueError
        ):  # requests' errors are OSErrors, a proxy's page none
            return NoContact(_words(error))
        return error


def _status_of(error: BaseException) -> int | None:
    """The HTTP status that the SDK writes into its message, or that requests keeps."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    found = re.search(r"status code (\d{3})", str(error))
    return int(found[1]) if found else None


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def _turn(loop: asyncio.AbstractEventLoop, chunks: AsyncGenerator[str]) -> None:
    """Run a loop until it is stopped, and close the stream, which nobody else may do, and the loop."""
    asyncio.set_event_loop(loop)
    loop.run_forever()
    waiting = asyncio.all_tasks(loop)
    for task in waiting:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*waiting, return_exceptions=True))
    loop.run_until_complete(chunks.aclose())
    loop.close()


@contextmanager
def _address_in_the_environment(address: str) -> Iterator[None]:
    """Ray's client takes RAY_ADDRESS, where it is set, in place of the address that it is given."""
    before = os.environ.get(OVERRIDE)
    os.environ[OVERRIDE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[OVERRIDE]
        else:
            os.environ[OVERRIDE] = before
