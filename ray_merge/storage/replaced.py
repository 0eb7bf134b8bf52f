"""Where reports go (evaluation.json, report.html): one object, whole or not at all, in place of an earlier one.

Results are published once and never overwritten; these are about them, and are made anew.
"""

from __future__ import annotations

import os

from ray_merge.storage.local import make_folder, sync_folder, temporary
from ray_merge.storage.remote import make_filesystem
from ray_merge.storage.retry import Backoff, final_error, is_transient, retrying
from ray_merge.storage.store import Store, join


def replace_object(store: Store, path: str, data: bytes) -> str:
    """Write an object, or write it anew; returns its URL.

    Raises:
        StoreDenied: the store refuses for good.
        StoreError: it fails after bounded retries.
    """
    url = join(store.url, path)
    if store.local_root is None:
        protocol = store.url.partition("://")[0]
        files = make_filesystem(protocol, store.url)
        retrying(
            lambda: files.pipe_file(url, data),
            retriable=is_transient,
            give_up=lambda error, tries: final_error(error, url, "writing", tries),
            backoff=Backoff(),
        )
        return url
    final = store.local_root / path
    try:
        make_folder(final.parent)
        with temporary(final) as copy:
            with open(copy, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(copy, final)
        sync_folder(final.parent)
    except OSError as error:
        raise final_error(error, url, "writing", 1) from error
    return url
