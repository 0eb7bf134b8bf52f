"""Tidying a prefix of a bucket: listing with ages by the server's clock, removal, uploads that were never completed.

A driver whose clock is a day ahead would take a run at work for an abandoned one, so ages are counted from the Date
that the server put on its own answer. In a bucket with versions a removed object leaves a delete marker.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from ray_merge.storage.remote import parallel
from ray_merge.storage.retry import error_code, final_error, http_status, is_transient, retrying
from ray_merge.storage.s3 import S3Store, open_s3
from ray_merge.storage.sweep import Entry, Upload


class S3Sweeper:
    """The folder of `store`, over its connections and with its retries. See `sweep.Sweeper`."""

    def __init__(self, store: S3Store) -> None:
        self.url = store.url
        self._store = store
        self._bucket, key, _ = store._fs.split_path(store._root)
        self._prefix = f"{key.rstrip('/')}/" if key else ""

    def entries(self, folder: str = "") -> Sequence[Entry]:
        """All objects; the folder markers of web consoles are none."""
        below = f"{folder}/" if folder else ""
        found = []
        for page in self._pages("list_objects_v2", {"ContinuationToken": "NextContinuationToken"}, below):
            now = _server_time(page)
            found += [
                Entry(one["Key"].removeprefix(self._prefix), one["Size"], _age(now, one["LastModified"]))
                for one in page.get("Contents", [])
                if not one["Key"].endswith("/")
            ]
        return sorted(found, key=lambda entry: entry.path)

    def uploads(self) -> Sequence[Upload]:
        """As old as its youngest part, or as its begin; not old at all where the store tells neither."""
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        begun = [
            (one, _server_time(page))
            for page in self._pages("list_multipart_uploads", markers)
            for one in page.get("Uploads", [])
        ]
        found = parallel(lambda pair: self._measured(*pair), begun)
        return sorted((one for one in found if one is not None), key=lambda one: (one.path, one.id))

    def remove(self, path: str) -> None:
        """DELETE of one key."""
        self._ask("removing", path, "delete_object", Key=self._prefix + path)

    def remove_empty(self, pattern: re.Pattern[str], older_than: float) -> None:
        """Nothing: a bucket has no folders."""

    def abort(self, upload: Upload) -> None:
        """AbortMultipartUpload."""
        self._ask(
            "aborting the upload of", upload.path, "abort_multipart_upload",
            Key=self._prefix + upload.path, UploadId=upload.id,
        )  # fmt: skip

    def _measured(self, begun: Mapping[str, Any], now: float) -> Upload | None:
        sizes: list[int] = []
        ages = (
            [_age(now, begun["Initiated"])] if "Initiated" in begun else []
        )  # SeaweedFS tells it since 4.48
        call, path = (
            {"Key": begun["Key"], "UploadId": begun["UploadId"]},
            begun["Key"].removeprefix(self._prefix),
        )
        while True:
            page = self._ask("looking up the upload of", path, "list_parts", **call)
            if page is None:
                return None
            for part in page.get("Parts", []):
                sizes.append(part["Size"])
                ages.append(_age(now, part["LastModified"]))
            if not page.get("IsTruncated"):
                break
            call["PartNumberMarker"] = page["NextPartNumberMarker"]
        return Upload(path, begun["UploadId"], len(sizes), sum(sizes), min(ages, default=0.0))

    def _pages(
        self, operation: str, markers: Mapping[str, str], below: str = ""
    ) -> Iterator[Mapping[str, Any]]:
        call: dict[str, Any] = {"Prefix": self._prefix + below}
        while True:
            page = self._ask("listing", "", operation, **call)
            assert page is not None
            yield page
            if not page.get("IsTruncated"):
                return
            call |= {name: page[value] for name, value in markers.items() if page.get(value)}

    def _ask(self, action: str, path: str, operation: str, **call: Any) -> Mapping[str, Any] | None:
        """The store's answer; None where the upload or the object is gone."""

        def ask() -> Mapping[str, Any] | None:
            try:
                answer: Mapping[str, Any] = self._store._fs.call_s3(operation, Bucket=self._bucket, **call)
            except Exception as error:
                if "Key" in call and (error_code(error) in {"NoSuchUpload", "NoSuchKey"} or _is_gone(error)):
                    return None
                raise
            return answer

        # Not `join`: keys of other writers may be no paths, and are only named here.
        url = f"{self.url}/{path}" if path else self.url
        return retrying(
            ask,
            retriable=is_transient,
            give_up=lambda error, tries: final_error(error, url, action, tries),
            backoff=self._store._backoff,
        )


def open_s3_sweeper(url: str) -> S3Sweeper:
    """The sweeper of s3://bucket/prefix, with a client of its own."""
    return S3Sweeper(open_s3(url))


def _is_gone(error: Exception) -> bool:
    return http_status(error) == 404 and error_code(error) != "NoSuchBucket"


def _age(now: float, then: datetime) -> float:
    return max(0.0, now - then.timestamp())  # a Date has whole seconds


def _server_time(page: Mapping[str, Any]) -> float:
    date = page["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    return parsedate_to_datetime(date).timestamp() if date else time.time()
