"""Put-if-absent on S3: one PUT, or a multipart upload, that the server refuses when the key exists.

Owns If-None-Match, parts and aborts; reading is `remote.RemoteStore`'s, and the single GET `s3_reader`'s. Calls
the S3 operations through s3fs instead of its file interface: s3fs' put(mode="create") uploads all parts of an
object that is there already, and an exception inside its open(key, "wb") leaves a truncated object.

One PUT takes up to 5 GiB, streamed from the file. AWS documents a conditional completion of multipart uploads
too, so there larger files go up in parallel parts. Elsewhere that is not to be relied on: SeaweedFS 4.48
looks first and completes then (8 completions at once: several winners in 27 of 40 races; 8 PUTs at once: one
winner in each of 80), so any other endpoint gets one PUT as long as S3's limit allows it.

A process that is killed in mid-upload leaves parts that no listing shows as an object but that are stored:
give the bucket a lifecycle rule AbortIncompleteMultipartUpload.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from aiobotocore.session import AioSession
from fsspec.asyn import sync

from ray_merge.errors import RayMergeError, StoreError, StoreUnfit
from ray_merge.storage.local import write_at
from ray_merge.storage.remote import RemoteStore, make_filesystem, parallel
from ray_merge.storage.retry import (
    Backoff,
    describe,
    error_code,
    http_status,
    is_already_there,
    is_transient,
    retrying,
)
from ray_merge.storage.s3_reader import RangeReader, body_seconds, check_answer
from ray_merge.storage.store import ObjectInfo, changed, check_new, join

MULTIPART_BYTES = 64 * 1024 * 1024
MAX_PUT_BYTES = 5 * 1024**3
"""S3's limit for one PUT."""

PART_BYTES = 16 * 1024 * 1024
PART_THREADS = 4
"""At most PART_THREADS * PART_BYTES = 64 MiB of a file are in memory; larger parts above 156 GiB."""

ABORT_TRIES = 3
"""A server that is away has had its tries already, and whoever waits for the upload's error waits for these too."""

MAX_PARTS = 10_000
"""S3's limit for one upload; the least part but the last is 5 MiB."""

ETAG = re.compile(r"[0-9a-f]{32}(-[0-9]+)?")
"""What S3 and its likes make (an MD5, or one of parts and their number) and take back in If-Match."""

log = logging.getLogger(__name__)


class S3Store(RemoteStore):
    """A folder of a bucket. See `store.Store` for what each method promises.

    Args:
        fs: an s3fs.S3FileSystem.
        root: bucket and prefix.
        url: what messages call it.
        backoff: how often every request is tried.
        reader: shared by the stores of one `fs`; None: a new one.
        multipart_bytes: longer objects go up in parts; None: MULTIPART_BYTES on AWS, MAX_PUT_BYTES elsewhere.
        part_bytes: length of one part.
        versions: bucket and key -> the entity tag that what is read must have.
    """

    def __init__(
        self,
        fs: Any,
        root: str,
        url: str,
        backoff: Backoff,
        *,
        reader: RangeReader | None = None,
        multipart_bytes: int | None = None,
        part_bytes: int = PART_BYTES,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(fs, root, url, backoff)
        self._reader = reader or RangeReader(fs)
        self._multipart_bytes = multipart_bytes
        self._part_bytes = part_bytes
        self._versions = versions or {}

    def put_if_absent(self, path: str, source: bytes | Path, metadata: Mapping[str, str]) -> bool:
        """One conditional PUT, or parts and a conditional completion."""
        check_new(path, metadata, self.url)
        n_bytes = source.stat().st_size if isinstance(source, Path) else len(source)

        def write() -> bool:
            self._check_conditional_writes()
            if n_bytes <= self._longest_put():
                return self._put(path, source, metadata)
            return self._upload(path, source, n_bytes, metadata)

        try:
            return self._retrying("writing", path, write, _is_conflict)
        except _Conflict as error:
            raise StoreError(join(self.url, path), "writing", self._backoff.attempts, str(error)) from None

    def metadata(self, path: str) -> Mapping[str, str]:
        """The object's user metadata, keys in lower case."""
        call = self._object(path)
        head = self._retrying("reading", path, lambda: self._fs.call_s3("head_object", **call))
        return {key.lower(): value for key, value in head["Metadata"].items()}

    def sub(self, path: str) -> S3Store:
        """The store of the folder `path`, over the same connections."""
        return self._like(self._key(path), join(self.url, path), self._versions)

    def pinned(self, files: Sequence[ObjectInfo]) -> S3Store:
        """Reads of `files` send If-Match; 412 is a RunFailed."""
        tags = {self._key(file.path): file.version for file in files if ETAG.fullmatch(file.version)}
        return self._like(self._root, self.url, {**self._versions, **tags})

    def _like(self, root: str, url: str, versions: Mapping[str, str]) -> S3Store:
        return S3Store(
            self._fs,
            root,
            url,
            self._backoff,
            reader=self._reader,
            multipart_bytes=self._multipart_bytes,
            part_bytes=self._part_bytes,
            versions=versions,
        )

    def _fetch(self, path: str, start: int, end: int) -> bytes:
        key = self._key(path)
        data = self._reader.read(key, start, end, self._versions.get(key))
        return self._fetch_slowly(path, start, end) if data is None else data

    def _fetch_into(self, path: str, start: int, end: int, target: int) -> int:
        key = self._key(path)
        n_bytes = self._reader.copy(key, start, end, target, self._versions.get(key))
        return write_at(target, self._fetch_slowly(path, start, end), start) if n_bytes is None else n_bytes

    def _fetch_slowly(self, path: str, start: int, end: int) -> bytes:
        """Through s3fs, which knows redirects and renewed credentials, and makes the error."""
        version = self._versions.get(self._key(path))
        match = {} if version is None else {"IfMatch": f'"{version}"'}
        try:
            answer = self._fs.call_s3(
                "get_object", **self._object(path), Range=f"bytes={start}-{end - 1}", **match
            )
        except Exception as error:
            if version is not None and http_status(error) == 412:
                raise changed(self.url, path, version, self.info(path)) from None
            raise
        check_answer(answer.get("ContentRange"), answer.get("ContentLength"), start, end)
        seconds = body_seconds(self._fs, end - start)
        data: bytes = sync(self._fs.loop, answer["Body"].read, timeout=seconds)
        return data

    def _object(self, path: str) -> dict[str, str]:
        bucket, key, _ = self._fs.split_path(self._key(path))
        return {"Bucket": bucket, "Key": key}

    def _check_conditional_writes(self) -> None:
        # s3fs drops arguments that botocore does not know: an old botocore would overwrite without a word.
        model = self._fs.s3.meta.service_model
        for operation in ("PutObject", "CompleteMultipartUpload"):
            if "IfNoneMatch" not in model.operation_model(operation).input_shape.members:
                raise StoreUnfit(self.url, f"this botocore has no If-None-Match for {operation}; upgrade it")

    def _longest_put(self) -> int:
        if self._multipart_bytes is not None:
            return self._multipart_bytes
        host = urlsplit(self._fs.s3.meta.endpoint_url).hostname or ""
        return MULTIPART_BYTES if host.endswith((".amazonaws.com", ".amazonaws.com.cn")) else MAX_PUT_BYTES

    def _put(self, path: str, source: bytes | Path, metadata: Mapping[str, str]) -> bool:
        call = {**self._object(path), "Metadata": dict(metadata), "IfNoneMatch": "*"}
        try:
            if isinstance(source, bytes):
                self._fs.call_s3("put_object", **call, Body=source)
            else:
                with open(source, "rb") as file:
                    self._fs.call_s3("put_object", **call, Body=file)
        except Exception as error:
            if is_already_there(error):
                self._check_present(path, error)
                return False
            raise
        return True

    def _check_present(self, path: str, error: Exception) -> None:
        # A proxy that repeats a PUT itself, or a writer that has removed the object again: nothing to adopt.
        if self.info(path) is None:
            raise _Conflict(f"refused, but nothing is there: {describe(error)}") from None

    def _upload(self, path: str, source: bytes | Path, n_bytes: int, metadata: Mapping[str, str]) -> bool:
        if self.info(path) is not None:  # saves the upload; the completion below is what decides
            return False
        target = self._object(path)
        begun = self._retrying(
            "writing",
            path,
            lambda: self._fs.call_s3("create_multipart_upload", **target, Metadata=dict(metadata)),
            _is_conflict,
        )
        upload = {**target, "UploadId": begun["UploadId"]}
        try:
            created = self._complete(path, upload, self._upload_parts(path, upload, source, n_bytes))
        except BaseException:
            self._abort(path, upload)
            raise
        if not created:
            self._abort(path, upload)
        return created

    def _upload_parts(
        self, path: str, upload: Mapping[str, str], source: bytes | Path, n_bytes: int
    ) -> list[dict[str, Any]]:
        part_bytes = max(self._part_bytes, math.ceil(n_bytes / MAX_PARTS))

        def send(start: int) -> dict[str, Any]:
            data = _slice(source, start, min(start + part_bytes, n_bytes))
            number = start // part_bytes + 1
            sent = self._retrying(
                "writing",
                path,
                lambda: self._fs.call_s3("upload_part", **upload, PartNumber=number, Body=data),
                _is_conflict,
            )
            return {"PartNumber": number, "ETag": sent["ETag"]}

        return [*parallel(send, range(0, n_bytes, part_bytes), PART_THREADS)]

    def _complete(self, path: str, upload: Mapping[str, str], parts: list[dict[str, Any]]) -> bool:
        def complete() -> bool:
            try:
                self._fs.call_s3(
                    "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
                )
            except Exception as error:
                if is_already_there(error):
                    self._check_present(path, error)
                    return False
                # The answer to a completion that worked got lost: the upload is gone, the object is there.
                if error_code(error) == "NoSuchUpload" and self.info(path) is not None:
                    return False
                if _is_conflict(error):
                    raise _Conflict(describe(error)) from None
                raise
            return True

        return self._retrying("writing", path, complete)

    def _abort(self, path: str, upload: Mapping[str, str]) -> None:
        def abort() -> None:
            try:
                self._fs.call_s3("abort_multipart_upload", **upload)
            except Exception as error:
                # Gone already: the answer to an abort, or to the completion, was lost.
                if error_code(error) != "NoSuchUpload":
                    raise

        tries = replace(self._backoff, attempts=min(ABORT_TRIES, self._backoff.attempts))
        try:
            retrying(
                abort,
                retriable=lambda error: is_transient(error) or _is_conflict(error),
                give_up=lambda error, _: RuntimeError(describe(error)),
                backoff=tries,
            )
        except RuntimeError as error:  # the upload's own error matters more; the parts stay hidden
            log.warning("%s: parts of a failed upload stay behind: %s", join(self.url, path), error)


class _Conflict(RayMergeError):
    """409 on a completion, or 412 for nothing: to be written again, an upload from its first part."""


def open_s3(
    url: str,
    *,
    backoff: Backoff | None = None,
    multipart_bytes: int | None = None,
    part_bytes: int = PART_BYTES,
) -> S3Store:
    """The store at `url`, s3://bucket/prefix, with a client of its own."""
    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    # One layer of retries, ours: botocore's five and s3fs' five would multiply with it.
    config = {"max_pool_connections": 32, "retries": {"total_max_attempts": 1}, **configured}
    # Whoever configures s3 for fsspec may name a session or a profile of it; then s3fs makes the session.
    own = {} if fsspec.config.conf.get("s3") else {"session": _session()}
    fs = make_filesystem("s3", url, config_kwargs=config, **own)
    fs.retries = 1
    return S3Store(
        fs,
        url.removeprefix("s3://"),
        url,
        backoff or Backoff(),
        multipart_bytes=multipart_bytes,
        part_bytes=part_bytes,
    )


def _session() -> AioSession:
    """A session with credentials of its own that shares botocore's tables of services and endpoints.

    Reading them costs 0.1 s of CPU for each client; with them in memory one takes 0.014 s.
    """
    session = AioSession()
    session.register_component("data_loader", _tables())
    return session


@cache
def _tables() -> Any:
    return AioSession().get_component("data_loader")


def _slice(source: bytes | Path, start: int, end: int) -> bytes:
    if isinstance(source, bytes):
        return source[start:end]
    with open(source, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), end - start, start)
    if len(data) != end - start:
        raise ValueError(f"{source} shrank while it was uploaded: wanted bytes {start}..{end}")
    return data


def _is_conflict(error: Exception) -> bool:
    # ConditionalRequestConflict, OperationAborted: another writer was at the same key at the same moment.
    return isinstance(error, _Conflict) or http_status(error) == 409
