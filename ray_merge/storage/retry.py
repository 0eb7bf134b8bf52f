"""Bounded retries: the one place where a storage call is tried again.

Owns how often, how long to wait, and which errors are worth it. The libraries' own retry layers are set to
one attempt (see `s3`), so that "9 tries" in a message means 9 requests.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ray_merge.errors import RayMergeError, StoreDenied, StoreError, redacted

T = TypeVar("T")

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP answers that say "later": RFC 9110 and 6585, and S3's SlowDown (503) and InternalError (500)."""

_PASSING = frozenset({404, 408, 409, 412, 416, 425, 429})
"""4xx answers that do not mean "you may not"."""

_TRANSPORT_MODULES = frozenset({"aiohttp", "botocore", "http", "httpcore", "httpx", "requests", "urllib3"})
_TRANSPORT_NAMES = (
    "ChunkedEncoding", "ClientOSError", "Connect", "Disconnected", "HTTPClientError", "IncompleteRead", "Payload",
    "Protocol", "ResponseParser", "ResponseStreaming", "Timeout", "TransportError",
)  # fmt: skip
"""By name: none of these libraries is imported for the sake of an `except`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits double from `first_seconds` up to `limit_seconds`, each shortened by a random half at most.

    The default of 9 attempts waits 8 to 16 s in all: longer than a restart of a single-node object store
    (measured: 4 to 8 s), shorter than anybody wants to wait for a wrong endpoint. The first waits are short, since
    most errors are single ones: with 20 % of all requests failing, a first wait of 0.25 s cost more than the work.
    """

    attempts: int = 9
    first_seconds: float = 0.0625
    limit_seconds: float = 8.0

    def wait_seconds(self, failed: int, jitter: float) -> float:
        """Seconds to wait after `failed` attempts; `jitter` in [0, 1) shortens the wait by up to a half."""
        longest: float = min(self.first_seconds * 2.0 ** (failed - 1), self.limit_seconds)
        return longest * (1.0 - jitter / 2.0)


def retrying(
    call: Callable[[], T],
    *,
    retriable: Callable[[Exception], bool],
    give_up: Callable[[Exception, int], Exception],
    backoff: Backoff,
) -> T:
    """The result of `call`, tried again while its error is `retriable` and attempts are left.

    Raises:
        Exception: what `give_up(last error, attempts made)` returns. Its cause is not chained: a client
            library's text may hold an endpoint with credentials, and `give_up` has cleaned it.
    """
    for attempt in range(1, backoff.attempts + 1):
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - sorted by `retriable`, and never swallowed
            if attempt == backoff.attempts or not retriable(error):
                raise give_up(error, attempt) from None
        time.sleep(backoff.wait_seconds(attempt, random.random()))
    raise AssertionError("Backoff.attempts must be at least 1")


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind `error`, looked for in it and in its causes; None when there is none."""
    seen: BaseException | None = error
    # aiohttp gives a connection that broke off a status of its own, 400.
    while seen is not None and not _is_transport(seen):
        response = getattr(seen, "response", None)
        if isinstance(response, dict):  # botocore ClientError
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # requests, httpx, huggingface_hub; aiohttp; gcsfs
            status = getattr(response, "status_code", getattr(seen, "status", getattr(seen, "code", None)))
        if isinstance(status, str) and status.isdigit():
            status = int(status)
        if isinstance(status, int):
            return status
        seen = seen.__cause__
    return None


def error_code(error: BaseException) -> str:
    """S3's error code behind `error` ("NoSuchBucket"), empty when there is none."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        seen = seen.__cause__
    return ""


def is_transient(error: Exception) -> bool:
    """True when the same request may succeed later: overload, server error, broken connection, time-out."""
    status = http_status(error)
    if status is not None:
        return status in TRANSIENT_STATUS or error_code(error) in {"SlowDown", "RequestTimeout"}
    return _is_transport(error)


def _is_transport(error: BaseException) -> bool:
    """True when the connection failed, so that no answer of the store is known."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return any(
        kind.__module__.split(".")[0] in _TRANSPORT_MODULES
        and any(name in kind.__name__ for name in _TRANSPORT_NAMES)
        for kind in type(error).__mro__
    )


def clean(text: str) -> str:
    """`text` without user names, passwords and queries in the URLs that it quotes, on one line."""
    return " ".join(re.sub(r"(://[^\s?\"']*)\?[^\s\"']*", r"\1", redacted(text)).split())


def describe(error: BaseException) -> str:
    """One cleaned line about `error`: what the store said, with its code and status where it gave any."""
    text = clean(str(error)) or type(error).__name__
    code, status = error_code(error), http_status(error)
    answer = " ".join(str(part) for part in (status, code if code != str(status) else "") if part)
    return f"{text} ({answer})" if answer and answer not in text else text


def is_already_there(error: Exception) -> bool:
    """True when a conditional write was refused because the object exists."""
    # s3fs makes OSError(EINVAL) of SeaweedFS' 412, and keeps the answer as its cause.
    return isinstance(error, FileExistsError) or http_status(error) == 412


def final_error(error: Exception, url: str, action: str, tries: int) -> Exception:
    """What the last `error` of a storage call means for the caller, in one sentence without secrets.

    Returns:
        StoreDenied when no retry could ever help (rights, bucket, region, missing credentials), StoreError
        otherwise; an error of this package as it is.
    """
    if isinstance(error, RayMergeError):
        return error
    # Botocore quotes the address, and without a scheme nobody can tell where a password in it begins.
    if isinstance(error, ValueError) and "Invalid endpoint" in str(error):
        return StoreDenied(url, action, "AWS_ENDPOINT_URL is no URL; write https://host")
    status = http_status(error)
    if status == 416:
        return StoreError(url, action, tries, f"shorter than asked for: {describe(error)}")
    refused = status is not None and 300 <= status < 500 and status not in _PASSING
    own = type(error).__module__.startswith(("botocore.", "google.auth.")) and not is_transient(error)
    if error_code(error) == "NoSuchBucket" or refused or own or isinstance(error, PermissionError):
        return StoreDenied(url, action, describe(error))
    if isinstance(error, FileNotFoundError) and error_code(error) != "NoSuchUpload":
        return StoreError(url, action, tries, "no such object")
    return StoreError(url, action, tries, describe(error))
