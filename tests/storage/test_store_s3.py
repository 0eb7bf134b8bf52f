"""S3 in particular: what happens when requests and answers get lost, and what the messages give away."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from fault_proxy import Drop, Hang, Lose, Reply, Shorten, fault_proxy, nth
from ray_merge.errors import StoreDenied, StoreError, StoreUnfit
from ray_merge.storage.retry import Backoff
from ray_merge.storage.s3 import open_s3
from ray_merge.storage.store import open_store
from s3_server import BUCKET, SECRET_KEY, make_client

pytestmark = pytest.mark.s3

QUICK = Backoff(attempts=3, first_seconds=0.01, limit_seconds=0.01)
PART = 5 << 20
DATA = random.Random(3).randbytes(PART + 1000)


@pytest.fixture
def url(s3):
    return f"{s3.url}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def client(s3):
    return make_client(s3.endpoint)


@pytest.fixture(scope="module")
def proxy(s3):
    with fault_proxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def proxied(s3, proxy):
    """The bucket as seen through the proxy; uploads above 5 MiB in parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_s3(s3.url, backoff=QUICK, multipart_bytes=PART, part_bytes=PART)
        store._fs.connect()
        return store


@pytest.fixture
def faulty(proxy, proxied, url):
    """Gives the proxy a rule; returns it, and the test's folder as seen through it."""

    def start(rule):
        proxy.begin(rule)
        return proxy, proxied.sub(url.rsplit("/", 1)[1])

    yield start
    proxy.begin(lambda call: None)


def unfinished_uploads(client, url):
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    return client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])


def test_a_lost_answer_to_a_write_is_found_as_already_there(faulty):
    proxy, store = faulty(nth(Lose(), "PUT", "shard", 1))
    assert store.put_if_absent("shard", b"bytes", {"sha256": "ours"}) is False
    assert proxy.count("PUT", "shard") == 2
    assert store.metadata("shard") == {"sha256": "ours"}
    assert store.read("shard") == b"bytes"


@pytest.mark.parametrize("fault", [Drop(), Reply(503, "SlowDown"), Reply(500, "InternalError")])
def test_a_write_that_never_arrived_is_sent_again(faulty, fault):
    proxy, store = faulty(nth(fault, "PUT", "shard", 1, 2))
    assert store.put_if_absent("shard", b"bytes", {}) is True
    assert proxy.count("PUT", "shard") == 3


def test_a_conflict_of_two_writers_is_tried_again(faulty):
    _, store = faulty(nth(Reply(409, "ConditionalRequestConflict"), "PUT", "shard", 1))
    assert store.put_if_absent("shard", b"bytes", {}) is True


def test_a_conflict_at_completion_begins_the_upload_again(faulty, client, url):
    proxy, store = faulty(nth(Reply(409, "ConditionalRequestConflict"), "POST", "uploadId=", 1))
    assert store.put_if_absent("shard", DATA, {"sha256": "1"}) is True
    assert proxy.count("PUT", "partNumber=1") == 2
    assert store.read("shard") == DATA
    assert unfinished_uploads(client, url) == []


def test_a_conflict_that_never_ends_is_an_error_that_counts_its_tries(faulty, client, url):
    _, store = faulty(nth(Reply(409, "ConditionalRequestConflict"), "POST", "uploadId="))
    with pytest.raises(StoreError, match=r"shard failed after 3 tries: .*409 ConditionalRequestConflict"):
        store.put_if_absent("shard", DATA, {})
    assert list(store.list()) == []
    assert unfinished_uploads(client, url) == []


def test_the_lost_answer_to_a_completion_is_found_as_already_there(faulty, client, url):
    _, store = faulty(nth(Lose(), "POST", "uploadId=", 1))
    assert store.put_if_absent("shard", DATA, {"sha256": "ours"}) is False
    assert store.metadata("shard") == {"sha256": "ours"}
    assert store.read("shard") == DATA
    assert unfinished_uploads(client, url) == []


@pytest.mark.parametrize("fault", [Drop(), Reply(409, "OperationAborted")])
def test_a_part_that_gets_lost_or_meets_a_conflict_is_sent_again(faulty, fault):
    proxy, store = faulty(nth(fault, "PUT", "partNumber=2", 1, 2))
    assert store.put_if_absent("shard", DATA, {}) is True
    assert proxy.count("PUT", "partNumber=2") == 3
    assert store.read("shard") == DATA


def test_an_upload_that_fails_leaves_no_object_and_no_parts(faulty, client, url):
    _, store = faulty(nth(Reply(500, "InternalError"), "PUT", "partNumber=2"))
    with pytest.raises(StoreError, match=r"writing .*/shard failed after 3 tries"):
        store.put_if_absent("shard", DATA, {})
    assert list(store.list()) == []
    assert unfinished_uploads(client, url) == []


def test_the_clean_up_of_a_failed_upload_is_tried_again(faulty, client, url):
    turns = nth(Reply(503, "SlowDown"), "DELETE", "uploadId=", 1, 2)
    _, store = faulty(
        lambda call: Reply(403, "AccessDenied") if "partNumber=2" in call.target else turns(call)
    )
    with pytest.raises(StoreDenied):
        store.put_if_absent("shard", DATA, {})
    assert unfinished_uploads(client, url) == []


def test_a_clean_up_that_was_done_already_is_no_warning(faulty, caplog):
    turns = nth(Reply(404, "NoSuchUpload"), "DELETE", "uploadId=")
    _, store = faulty(
        lambda call: Reply(403, "AccessDenied") if "partNumber=2" in call.target else turns(call)
    )
    with pytest.raises(StoreDenied):
        store.put_if_absent("shard", DATA, {})
    assert "stay behind" not in caplog.text


@pytest.mark.parametrize("place", [("PUT", "partNumber=2"), ("POST", "uploadId=")])
def test_an_upload_that_another_gave_up_is_named(faulty, place):
    _, store = faulty(nth(Reply(404, "NoSuchUpload"), *place))
    with pytest.raises(StoreError, match="404 NoSuchUpload"):
        store.put_if_absent("shard", DATA, {})


def test_when_the_clean_up_fails_too_the_first_error_is_the_one_that_is_told(faulty, caplog):
    def broken(call):
        return (
            Reply(403, "AccessDenied") if "partNumber=2" in call.target or call.method == "DELETE" else None
        )

    _, store = faulty(broken)
    with pytest.raises(
        StoreDenied, match=r"writing .*/shard was refused: made by the test \(403 AccessDenied\)"
    ):
        store.put_if_absent("shard", DATA, {})
    assert "parts of a failed upload stay behind" in caplog.text
    assert list(store.list()) == []


def test_a_source_that_shrinks_during_the_upload_leaves_no_object(faulty, client, url, tmp_path):
    source = tmp_path / "shard"
    source.write_bytes(DATA)

    def shrink(call):
        if call.method == "POST" and "uploads" in call.target:
            source.write_bytes(b"less")

    _, store = faulty(shrink)
    with pytest.raises(StoreError, match="shrank while it was uploaded"):
        store.put_if_absent("shard", source, {})
    assert list(store.list()) == []
    assert unfinished_uploads(client, url) == []


def test_an_object_that_is_there_is_not_uploaded_in_vain(faulty):
    proxy, store = faulty(lambda call: None)
    store.put_if_absent("shard", b"first", {})
    assert store.put_if_absent("shard", DATA, {}) is False
    assert proxy.count("POST") == 0


def test_the_completion_decides_when_the_object_appears_during_the_upload(faulty, client, url):
    other = open_store(url)

    def appear(call):
        if "partNumber=1" in call.target:
            other.put_if_absent("shard", b"first", {})

    _, store = faulty(appear)
    assert store.put_if_absent("shard", DATA, {}) is False
    assert store.read("shard") == b"first"
    assert unfinished_uploads(client, url) == []


@pytest.mark.parametrize("fault", [Drop(), Shorten(), Reply(503, "SlowDown")])
def test_a_read_that_breaks_is_tried_again_and_never_short(faulty, fault):
    _, store = faulty(nth(fault, "GET", "shard", 1, 2))
    store.put_if_absent("shard", b"0123456789" * 1000, {})
    assert store.read("shard", 5, 9005) == (b"0123456789" * 1000)[5:9005]


def test_a_read_that_always_breaks_is_an_error_after_bounded_tries(faulty):
    proxy, store = faulty(nth(Shorten(), "GET", "shard"))
    store.put_if_absent("shard", bytes(1000), {})
    with pytest.raises(StoreError, match=r"reading .*/shard failed after 3 tries"):
        store.read("shard", 0, 1000)
    assert proxy.count("GET", "shard") == 3


def test_only_the_failed_range_is_read_again(faulty):
    proxy, store = faulty(nth(Drop(), "GET", "shard", 2))
    data = random.Random(1).randbytes(2_000_000)
    store.put_if_absent("shard", data, {})
    ranges = [(0, 10), (900_000, 900_010), (1_900_000, 1_900_010)]
    assert list(store.read_ranges("shard", ranges)) == [data[start:end] for start, end in ranges]
    assert proxy.count("GET", "shard") == 4


def test_an_object_replaced_during_a_download_is_not_taken(faulty, client, url, tmp_path):
    key = f"{url.removeprefix(f's3://{BUCKET}/')}/shard"

    def replace(call):
        if call.method == "GET":
            client.put_object(Bucket=BUCKET, Key=key, Body=b"later")

    _, store = faulty(replace)
    store.put_if_absent("shard", b"first", {})
    with pytest.raises(StoreError, match="changed while it was read"):
        store.download("shard", tmp_path / "copy")
    assert [*tmp_path.iterdir()] == []


def test_thousands_of_objects_list_in_one_pass_of_pages(faulty, client, url):
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    proxy, store = faulty(lambda call: None)
    names = [f"receipts/{number:04}.json" for number in range(1100)]
    with ThreadPoolExecutor(8) as threads:
        list(
            threads.map(
                lambda name: client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b""), names
            )
        )
    assert [info.path for info in store.list()] == names
    assert proxy.count("GET") == 2


def test_a_bucket_that_is_not_there_is_refused_and_not_made():
    store = open_store("s3://no-such-bucket/x")
    for call in (store.list, lambda: store.read("a"), lambda: store.put_if_absent("a", b"x", {})):
        with pytest.raises(StoreDenied, match=r"s3://no-such-bucket/x.*\(404 NoSuchBucket\)"):
            call()


def test_wrong_credentials_are_refused_without_showing_them(s3, url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-geheim")
    store = open_store(url)
    for call in (store.list, lambda: store.read("a"), lambda: store.put_if_absent("a", b"x", {})):
        with pytest.raises(
            StoreDenied, match=r"was refused: .*403.*check the URL, the credentials"
        ) as caught:
            call()
        shown = f"{caught.value} {caught.value!r} {store!r} {store.url}"
        assert "geheim" not in shown
        assert SECRET_KEY not in shown


def test_missing_credentials_are_refused(url, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreDenied, match="was refused: Unable to locate credentials"):
        open_store(url).list()


def test_new_credentials_are_used_by_a_store_that_is_opened_anew(url, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StoreDenied):
            open_store(url).list()
    assert list(open_store(url).list()) == []


def test_a_server_that_is_not_there_is_an_error_without_its_credentials(url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=f"listing {url} failed after 3 tries: .*127.0.0.1:9"):
        open_s3(url, backoff=QUICK).list()


def test_settings_in_fsspecs_own_configuration_are_respected(s3, url, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    settings = {"endpoint_url": s3.endpoint, "config_kwargs": {"max_pool_connections": 3}}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    store = open_s3(url)
    assert list(store.list()) == []
    assert store._fs.s3.meta.config.max_pool_connections == 3


def test_a_botocore_without_conditional_writes_is_unfit(url):
    store = open_s3(url)
    members = store._fs.s3.meta.service_model.operation_model("PutObject").input_shape.members
    del members["IfNoneMatch"]
    with pytest.raises(StoreUnfit, match="no If-None-Match for PutObject"):
        store.put_if_absent("a", b"x", {})
    assert list(store.list()) == []


PUT = """
import sys
from ray_merge.storage.s3 import open_s3
open_s3(sys.argv[1], multipart_bytes=int(sys.argv[2]), part_bytes=5 << 20).put_if_absent("shard", bytes(6 << 20), {})
"""


@pytest.mark.parametrize(
    ("multipart_bytes", "method", "part"), [(9 << 20, "PUT", "shard"), (1, "POST", "uploadId=")]
)
def test_a_process_killed_in_mid_upload_leaves_nothing_that_looks_like_an_object(
    faulty, url, monkeypatch, multipart_bytes, method, part
):
    proxy, store = faulty(nth(Hang(), method, part))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    with subprocess.Popen([sys.executable, "-c", PUT, url, str(multipart_bytes)]) as child:
        assert proxy.hanging.wait(30)
        child.send_signal(signal.SIGKILL)
    proxy.begin(lambda call: None)
    assert list(store.list()) == []
    assert store.info("shard") is None
    assert store.put_if_absent("shard", DATA, {}) is True
    assert store.read("shard") == DATA


@pytest.mark.parametrize(
    ("endpoint", "longest"),
    [
        (None, 64 << 20),
        ("https://s3.eu-west-1.amazonaws.com", 64 << 20),
        ("https://objects.example.com", 5 << 30),
        ("https://s3.amazonaws.com.example.com", 5 << 30),
    ],
)
def test_only_aws_is_trusted_to_complete_uploads_in_parts_conditionally(url, monkeypatch, endpoint, longest):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert open_s3(url)._longest_put() == longest


def test_a_long_file_is_streamed_not_loaded(s3, url, tmp_path):
    (tmp_path / "shard").write_bytes(b"")
    os.truncate(tmp_path / "shard", 96 << 20)
    command = [sys.executable, "-c", STREAM, url, str(tmp_path / "shard")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 48 << 20
    assert open_store(url).info("shard").n_bytes == 96 << 20


STREAM = """
import resource, sys
from pathlib import Path
from ray_merge.storage.store import open_store
store = open_store(sys.argv[1])
store.put_if_absent("small", b"x", {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert store.put_if_absent("shard", Path(sys.argv[2]), {})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
