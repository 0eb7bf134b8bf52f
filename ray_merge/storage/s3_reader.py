"""Byte ranges of S3 objects: signed by botocore once per object and minute, fetched by plain GETs.

Owns the GET. Everything that decides where it goes and who sends it (endpoint, region, addressing, credentials of any
kind, proxies, certificates) stays botocore's: the request is prepared and signed by the client that s3fs made, caught
before it is sent, and sent as often as ranges are read. A range need not be part of the signature.

Why: s3fs reads every answer on one thread of one event loop, and signs each request anew. 500 ranges of 256 KB from
SeaweedFS on loopback cost its client 0.98 s of CPU, pyarrow's 0.42 s, this one 0.34 s (benchmarks/s3_speed.py).
pyarrow's client would have to be told all that botocore knows, and its errors carry no HTTP status of their own.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from botocore.awsrequest import AWSPreparedRequest
from botocore.endpoint import EndpointCreator
from botocore.exceptions import ClientError
from botocore.parsers import create_parser
from fsspec.asyn import sync
from s3fs.errors import translate_boto_error

from ray_merge.errors import shown
from ray_merge.storage.local import write_at
from ray_merge.storage.retry import TRANSIENT_STATUS

SIGNATURE_SECONDS = 60.0
"""S3 takes a signature for 15 minutes; botocore renews temporary credentials 10 minutes before they expire."""

CHUNK_BYTES = 512 * 1024
"""Of a body on its way to a file: the allocator hands the same pages out again, which 16 MiB at once would not."""

MAX_ERROR_BYTES = 64 * 1024
"""Of the text of an error; S3's have some 300."""

SLOWEST_BYTES_PER_SECOND = 100_000
"""A body may take the client's read time-out and its length at this speed. A server that sends a byte every few seconds
would never run into the time-out, which is counted anew from each byte."""

READ_SECONDS = 60.0
"""Where the client's configuration sets no read time-out at all; botocore's own default."""

_WATCH_SECONDS = 0.5

_signing: ContextVar[bool] = ContextVar("signing", default=False)


@dataclass(frozen=True, slots=True)
class _Signed:
    """A GET of one whole object as it would have been sent, and until when (monotonic seconds) it may be used."""

    url: str
    headers: dict[str, str]
    until: float


class _CaughtRequest(Exception):
    """Carries a prepared request out of botocore; its text holds nothing of it."""

    def __init__(self, request: Any) -> None:
        super().__init__("caught before it was sent")
        self.request = request


class _Deadlines:
    """Ends connections whose answer takes too long, from a thread that lives while any is waited for.

    A look at the clock between pieces would do as well, but pieces have to be joined: with it `read` cost a copy.
    """

    def __init__(self) -> None:
        self._until: dict[object, tuple[float, Any]] = {}
        self._watcher: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def within(self, body: Any, seconds: float) -> Iterator[None]:
        """The time for `body`, an answer of urllib3.

        Raises:
            TimeoutError: it was over.
        """
        mark = object()
        with self._lock:
            self._until[mark] = (time.monotonic() + seconds, body)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="s3-deadlines", daemon=True)
                self._watcher.start()
        try:
            yield
        except Exception as error:
            if mark not in self._until:
                raise TimeoutError(f"the answer was not complete after {seconds:.0f} s") from error
            raise
        finally:
            with self._lock:
                self._until.pop(mark, None)

    def _watch(self) -> None:
        while True:
            time.sleep(_WATCH_SECONDS)
            with self._lock:
                now = time.monotonic()
                late = [mark for mark, (until, _) in self._until.items() if until < now]
                for mark in late:
                    _, body = self._until.pop(mark)
                    # It may have just ended by itself.
                    with contextlib.suppress(OSError, RuntimeError, ValueError):
                        body.shutdown()
                if not self._until:
                    self._watcher = None
                    return


class RangeReader:
    """Reads ranges through the settings of one s3fs.S3FileSystem; may be used by several threads at once."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._signed: dict[str, _Signed] = {}
        self._http: Any = None
        self._deadlines = _Deadlines()
        self._lock = threading.Lock()

    def read(self, path: str, start: int, end: int, version: str | None = None) -> bytes | None:
        """Bytes `start`..`end` of bucket/key `path` in one request; fewer when connection or object ended before.

        Args:
            path: bucket/key.
            start: first byte.
            end: last byte + 1.
            version: the entity tag that the object must have; None: any.

        Returns:
            None when the store answered anything but the bytes or "later": ask again through s3fs, which knows
            redirects and renewed credentials, and makes the error.

        Raises:
            OSError: as s3fs would raise it, of an answer that says "later"; ConnectionError of other bytes than were
                asked for; TimeoutError of an answer that takes too long.
            botocore.exceptions.BotoCoreError: no credentials, no endpoint, or no connection.
        """
        with self._get(path, start, end, version) as body:
            data: bytes | None = None if body is None else body.read()
            return data

    def copy(self, path: str, start: int, end: int, target: int, version: str | None = None) -> int | None:
        """Write bytes `start`..`end` to the same place of the open file `target`, a chunk at a time.

        Returns:
            How many came; None and errors as for `read`.
        """
        with self._get(path, start, end, version) as body:
            if body is None:
                return None
            at = start
            while data := body.read(CHUNK_BYTES):
                at += write_at(target, data, at)
            return at - start

    @contextlib.contextmanager
    def _get(self, path: str, start: int, end: int, version: str | None) -> Iterator[Any]:
        signed = self._signature(path)
        headers = {**signed.headers, "Range": f"bytes={start}-{end - 1}"}
        if version is not None:
            headers["If-Match"] = f'"{version}"'
        request = AWSPreparedRequest("GET", signed.url, headers, body=None, stream_output=True)
        response = self._session().send(request)
        try:
            with self._deadlines.within(response.raw, body_seconds(self._fs, end - start)):
                if response.status_code in TRANSIENT_STATUS:
                    raise _as_s3fs(response)
                if response.status_code != 206:
                    self._signed.pop(path, None)
                    yield None
                    return
                check_answer(
                    response.headers.get("Content-Range"), response.headers.get("Content-Length"), start, end
                )
                yield response.raw
        finally:
            response.raw.close()  # a connection whose answer was read to its end is back in the pool by now

    def _signature(self, path: str) -> _Signed:
        found = self._signed.get(path)
        if found is not None and time.monotonic() < found.until:
            return found
        until = time.monotonic() + SIGNATURE_SECONDS
        request = sync(self._fs.loop, self._catch, path)
        headers = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in request.headers.items()
        }
        with self._lock:
            now = time.monotonic()
            self._signed = {name: other for name, other in self._signed.items() if now < other.until}
            return self._signed.setdefault(path, _Signed(request.url, headers, until))

    async def _catch(self, path: str) -> Any:
        bucket, key, _ = self._fs.split_path(path)
        await self._fs.set_session()
        client = await self._fs.get_s3(bucket)
        client.meta.events.register("before-send.s3.GetObject", _catch_request, unique_id="ray-merge")
        _signing.set(True)  # seen by this task alone
        try:
            await self._fs._call_s3("get_object", Bucket=bucket, Key=key)
        except _CaughtRequest as caught:
            return caught.request
        raise RuntimeError("botocore sent a GET that its event before-send.s3.GetObject should have stopped")

    def _session(self) -> Any:
        with self._lock:
            if self._http is None:
                self._http = _http_session(self._fs)
            return self._http


def body_seconds(fs: Any, n_bytes: int) -> float:
    """How long an answer of `n_bytes` may take, counted from its headers."""
    return float(fs.s3.meta.config.read_timeout or READ_SECONDS) + n_bytes / SLOWEST_BYTES_PER_SECOND


def check_answer(content_range: str | None, content_length: str | int | None, start: int, end: int) -> None:
    """Let no other bytes through than `start`..`end`; fewer only where the answer says so itself.

    Args:
        content_range: header of an answer with status 206.
        content_length: header.
        start: first byte that was asked for.
        end: last byte + 1.

    Raises:
        ConnectionError: a broken proxy or server; ask again.
    """
    length = str(content_length)
    n_bytes = int(length) if re.fullmatch("[0-9]{1,18}", length) else 0
    said = f"bytes {start}-{start + n_bytes - 1}/"
    if not 0 < n_bytes <= end - start or not str(content_range).startswith(said):
        raise ConnectionError(
            f"asked for bytes {start}-{end - 1}, the answer says Content-Range {shown(content_range)} and "
            f"Content-Length {shown(content_length)}"
        )


def _catch_request(request: Any, **_: Any) -> None:
    if _signing.get():
        raise _CaughtRequest(request)


def _http_session(fs: Any) -> Any:
    """Botocore's own connections, with the proxies, certificates and time limits of the client of `fs`."""
    meta = fs.s3.meta
    verify = fs.client_kwargs.get("verify")
    endpoint = EndpointCreator(meta.events).create_endpoint(
        meta.service_model,
        region_name=meta.region_name,
        endpoint_url=meta.endpoint_url,
        verify=fs.session.get_config_variable("ca_bundle") if verify is None else verify,
        response_parser_factory=None,
        timeout=(meta.config.connect_timeout, meta.config.read_timeout),
        max_pool_connections=meta.config.max_pool_connections,
        proxies=meta.config.proxies,
        client_cert=meta.config.client_cert,
        proxies_config=meta.config.proxies_config,
    )
    return endpoint.http_session


def _as_s3fs(response: Any) -> Exception:
    answer = {
        "status_code": response.status_code,
        "headers": response.headers,
        "body": response.raw.read(MAX_ERROR_BYTES),
    }
    error: Exception = translate_boto_error(
        ClientError(create_parser("rest-xml").parse(answer, None), "GetObject")
    )
    return error
