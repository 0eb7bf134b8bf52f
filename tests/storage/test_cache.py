from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fault_proxy import Drop, Hang, fault_proxy, nth
from ray_merge.errors import Refusal, StoreError
from ray_merge.storage.cache import NodeCache, cache_folder
from ray_merge.storage.store import open_store
from s3_server import BUCKET, make_client

DATA = random.Random(5).randbytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def cache(tmp_path):
    return NodeCache(tmp_path / "cache")


@pytest.fixture(scope="module")
def proxy(s3):
    with fault_proxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bucket(s3, proxy):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(s3.url)
        assert store.info("nothing") is None
        return store


@pytest.fixture
def adapter(bucket):
    """A store with one adapter file, seen through the proxy, and what a plan saw of it."""
    store = bucket.sub(uuid.uuid4().hex)
    store.put_if_absent("adapter_model.safetensors", DATA, {})
    return store, "adapter_model.safetensors", store.info("adapter_model.safetensors")


@pytest.fixture
def watched(proxy):
    """Gives the proxy a rule and begins to count."""

    def start(rule=lambda call: None):
        proxy.begin(rule)
        return proxy

    yield start
    proxy.begin(lambda call: None)


def test_a_local_file_is_used_where_it_lies(cache, tmp_path):
    store = open_store(str(tmp_path / "store"))
    store.put_if_absent("a/w", DATA, {})
    cached = cache.fetch(store.url, "a/w", store.info("a/w"))
    assert cached.path == tmp_path / "store" / "a" / "w"
    assert cached.sha256 == SHA256


def test_a_local_file_that_changed_since_it_was_planned_is_refused(cache, tmp_path):
    store = open_store(str(tmp_path / "store"))
    store.put_if_absent("w", DATA, {})
    planned = store.info("w")
    (tmp_path / "store" / "w").write_bytes(b"other")
    with pytest.raises(StoreError, match=r"is now version .* with 5 bytes; plan again"):
        cache.fetch(store.url, "w", planned)
    (tmp_path / "store" / "w").unlink()
    with pytest.raises(StoreError, match="is now gone; plan again"):
        cache.fetch(store.url, "w", planned)


@pytest.mark.s3
def test_a_remote_file_is_downloaded_once_and_then_served_from_disk(cache, adapter, watched):
    proxy = watched()
    first = cache.fetch(*adapter)
    assert first.path.read_bytes() == DATA
    assert first.sha256 == SHA256
    asked = len(proxy.calls)
    assert cache.fetch(*adapter) == first
    assert NodeCache(cache._folder).fetch(adapter[0].url, *adapter[1:]) == first
    assert len(proxy.calls) == asked
    assert proxy.count("GET", "adapter_model") == 1


FETCH = """
import sys
from pathlib import Path
from ray_merge.storage.cache import NodeCache
from ray_merge.storage.store import ObjectInfo
folder, url, path, n_bytes, version = sys.argv[1:]
print(NodeCache(Path(folder)).fetch(url, path, ObjectInfo(path, int(n_bytes), version)).sha256)
"""


def start_child(cache, adapter, proxy):
    store, path, info = adapter
    arguments = [str(cache._folder), store.url, path, str(info.n_bytes), info.version]
    environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
    command = [sys.executable, "-c", FETCH, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def waits_for_the_lock(pid):
    with contextlib.suppress(OSError):
        return any(os.readlink(file).endswith("/lock") for file in Path(f"/proc/{pid}/fd").iterdir())
    return False


@pytest.mark.s3
def test_several_processes_and_threads_at_once_download_it_once(cache, adapter, watched):
    children = []

    def until_the_others_wait(call):
        # The first download begins when the children are at the lock, so it is contended for certain.
        deadline = time.monotonic() + 30
        while call.method == "GET" and not all(waits_for_the_lock(child.pid) for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    proxy = watched(until_the_others_wait)
    children += [start_child(cache, adapter, proxy) for _ in range(2)]
    with ThreadPoolExecutor(3) as threads:
        cached = set(threads.map(lambda _: NodeCache(cache._folder).fetch(*adapter), range(3)))
    assert len(cached) == 1
    assert [child.communicate(timeout=30)[0].strip() for child in children] == [SHA256, SHA256]
    assert proxy.count("GET", "adapter_model") == 1


@pytest.mark.s3
def test_a_kill_during_the_download_leaves_nothing_that_counts(cache, adapter, watched):
    proxy = watched(nth(Hang(), "GET", "adapter_model"))
    with start_child(cache, adapter, proxy) as child:
        assert proxy.hanging.wait(30)
        child.send_signal(signal.SIGKILL)
    assert len([*cache._folder.rglob(".tmp-*")]) == 1
    assert [*cache._folder.rglob("data")] == []
    proxy.begin(lambda call: None)
    assert cache.fetch(*adapter).path.read_bytes() == DATA
    assert [*cache._folder.rglob(".tmp-*")] == []


@pytest.mark.s3
@pytest.mark.parametrize("length", [0, 1, len(DATA) - 1, len(DATA) + 1])
def test_a_cached_file_of_another_length_is_downloaded_again(cache, adapter, length):
    path = cache.fetch(*adapter).path
    os.truncate(path, length)
    assert cache.fetch(*adapter).path.read_bytes() == DATA


@pytest.mark.s3
def test_bytes_without_a_whole_entry_beside_them_do_not_count(cache, adapter, watched):
    path = cache.fetch(*adapter).path
    entry = path.with_name("entry.json")
    good = entry.read_bytes()
    assert json.loads(good)["sha256"] == SHA256
    proxy = watched()
    for bad in (None, b"", good[:-5], b'{"sha256": "short"}'):
        entry.unlink() if bad is None else entry.write_bytes(bad)
        path.write_bytes(b"?" * len(DATA))
        assert cache.fetch(*adapter).path.read_bytes() == DATA
        assert entry.read_bytes() == good
    assert proxy.count("GET", "adapter_model") == 4


@pytest.mark.s3
def test_another_version_is_another_file(cache, adapter, s3):
    store, path, _ = adapter
    first = cache.fetch(*adapter)
    key = f"{store.url.removeprefix(f's3://{BUCKET}/')}/{path}"
    make_client(s3.endpoint).put_object(Bucket=BUCKET, Key=key, Body=DATA[::-1])
    second = cache.fetch(store, path, store.info(path))
    assert second.path != first.path
    assert second.path.read_bytes() == DATA[::-1]
    assert cache.fetch(*adapter) == first


@pytest.mark.s3
def test_an_object_that_is_not_what_was_planned_is_refused_and_not_kept(cache, adapter):
    store, path, info = adapter
    with pytest.raises(StoreError, match="it was version other with 300000 bytes when planned"):
        cache.fetch(store, path, replace(info, version="other"))
    assert [*cache._folder.rglob("entry.json")] == []


@pytest.mark.s3
def test_a_download_that_breaks_is_continued_by_its_retries(cache, adapter, watched):
    watched(nth(Drop(), "GET", "adapter_model", 1))
    assert cache.fetch(*adapter).sha256 == SHA256


@pytest.mark.s3
def test_a_folder_that_takes_no_file_is_named_with_what_to_do(adapter, tmp_path):
    (tmp_path / "cache").write_bytes(b"")  # as a full disk, which many find only at fsync or rename
    with pytest.raises(
        StoreError, match=rf"adapter_model.*{tmp_path}/cache.*--cache-dir names another folder"
    ):
        NodeCache(tmp_path / "cache").fetch(*adapter)


def test_a_cache_folder_that_does_not_exist_yet_is_made_by_whoever_writes(tmp_path):
    assert cache_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_cache_folder_that_cannot_be_one_is_refused(tmp_path, below):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Refusal, match=r"file is no folder; --cache-dir"):
        cache_folder(tmp_path / "file" / below)


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_cache_folder_without_the_right_to_write_is_refused(below):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in a folder that other users cannot look into
        closed = Path(name)
        closed.chmod(0o555)
        try:
            if user == 0:  # root may write anywhere
                os.seteuid(65534)
            with pytest.raises(Refusal, match=r" may not be written to; --cache-dir"):
                cache_folder(closed / below)
        finally:
            os.seteuid(user)
            closed.chmod(0o755)
