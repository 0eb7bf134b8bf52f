"""The GET that S3Store sends itself: what s3fs would have sent, and every error as s3fs would have told it."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import uuid
from dataclasses import replace
from urllib.parse import urlsplit

import fsspec
import pytest
from botocore.awsrequest import AWSPreparedRequest

from fault_proxy import Drip, Hang, Reply, Shift, fault_proxy, nth
from ray_merge.errors import RayMergeError, RunFailed, StoreDenied, StoreError
from ray_merge.storage import s3_reader
from ray_merge.storage.remote import RemoteStore
from ray_merge.storage.retry import Backoff
from ray_merge.storage.s3 import open_s3
from ray_merge.storage.store import open_store

QUICK = Backoff(attempts=3, first_seconds=0.01, limit_seconds=0.01)
DATA = random.Random(4).randbytes(100_000)

on_server = pytest.mark.s3


@pytest.fixture
def url(s3):
    return f"{s3.url}/{uuid.uuid4().hex}"


@pytest.fixture
def proxied(s3, url, monkeypatch):
    """A proxy, and a store behind it that holds `shard`."""
    with fault_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_s3(url, backoff=QUICK)
        store.put_if_absent("shard", DATA, {})
        yield proxy, store


def through_s3fs(store):
    """The same folder, read by s3fs alone."""
    return RemoteStore(store._fs, store._root, store.url, QUICK)


def outcome(call):
    try:
        return call()
    except RayMergeError as error:
        # Botocore puts its own count in, which is of no use to anybody here: it is told to try once.
        return type(error), str(error).replace(" (reached max retries: 0)", "")


@on_server
@pytest.mark.parametrize("fault", [
    Reply(503, "SlowDown"), Reply(500, "InternalError"), Reply(403, "AccessDenied"), Reply(404, "NoSuchKey"),
    Reply(404, "NoSuchBucket"), Reply(416, "InvalidRange"), Reply(400, "ExpiredToken"), Reply(429, "TooManyRequests"),
])  # fmt: skip
def test_an_error_is_told_as_s3fs_tells_it(proxied, fault):
    proxy, store = proxied
    proxy.begin(nth(fault, "GET", "shard"))
    told = outcome(lambda: store.read("shard", 0, 10))
    assert told == outcome(lambda: through_s3fs(store).read("shard", 0, 10))
    assert told[0] in {StoreError, StoreDenied}


@on_server
@pytest.mark.parametrize("fault", [Reply(503, "SlowDown"), Reply(500, "InternalError")])
def test_as_many_requests_are_sent_as_the_message_says(proxied, fault):
    proxy, store = proxied
    proxy.begin(nth(fault, "GET", "shard"))
    with pytest.raises(StoreError, match="after 3 tries"):
        store.read("shard", 0, 10)
    assert proxy.count("GET", "shard") == 3


@on_server
@pytest.mark.parametrize("status", [301, 307, 400, 403])
def test_what_s3fs_may_know_better_is_asked_through_it_and_signed_anew(proxied, status, tmp_path):
    proxy, store = proxied
    proxy.begin(nth(Reply(status, "SomethingElse"), "GET", "shard", 1, 4))
    assert store.read("shard", 5, 10) == DATA[5:10]
    assert proxy.count("GET", "shard") == 2
    assert store.read("shard", 5, 10) == DATA[5:10]
    assert proxy.count("GET", "shard") == 3
    store.download("shard", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA
    assert proxy.count("GET", "shard") == 5


@on_server
def test_a_signature_that_the_server_no_longer_takes_is_made_again(proxied):
    proxy, store = proxied
    store.read("shard", 0, 1)
    (path, signed), *_ = store._reader._signed.items()
    headers = {**signed.headers, "Authorization": signed.headers["Authorization"][:-4] + "0000"}
    store._reader._signed[path] = replace(signed, headers=headers)
    proxy.begin(lambda call: None)
    assert [store.read("shard", 0, 9) for _ in range(3)] == [DATA[:9]] * 3
    assert proxy.count("GET", "shard") == 4


@on_server
def test_signatures_end_after_their_time(url, monkeypatch):
    store = open_store(url)
    store.put_if_absent("a", DATA, {})
    store.put_if_absent("b", DATA, {})
    store.read("a", 0, 1)
    used = store._reader._signed.copy()
    store.read("a", 1, 2)
    assert store._reader._signed == used
    now = s3_reader.time.monotonic()
    monkeypatch.setattr(s3_reader.time, "monotonic", lambda: now + s3_reader.SIGNATURE_SECONDS)
    store.read("b", 0, 1)
    assert [path.rsplit("/", 1)[1] for path in store._reader._signed] == ["b"]


@on_server
@pytest.mark.parametrize("name", ["a b", "a+b", "a%2Fb", "ü=&?#", "x=1,y='2'/~(z)!*"])
def test_names_that_a_url_must_quote_are_read(url, name):
    store = open_store(url)
    store.put_if_absent(name, DATA, {})
    assert store.read(name, 3, 99) == DATA[3:99]


@on_server
def test_a_store_that_does_not_answer_is_given_up_after_the_clients_time_limit(s3, url, monkeypatch):
    open_store(url).put_if_absent("shard", DATA, {})
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 0.2}})
    with fault_proxy(s3.endpoint, nth(Hang(), "GET", "shard")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(StoreError, match=r"reading .*shard failed after 3 tries: .*[Tt]imeout"):
            open_s3(url, backoff=QUICK).read("shard", 0, 10)
        assert proxy.count("GET", "shard") == 3


@on_server
@pytest.mark.parametrize("how", ["read", "download"])
def test_an_answer_that_never_ends_is_given_up_although_bytes_keep_coming(
    s3, url, monkeypatch, tmp_path, how
):
    open_store(url).put_if_absent("shard", DATA, {})
    # Longer than a loaded server takes for an honest answer.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 2.0}})
    with fault_proxy(s3.endpoint, nth(Drip(0.1), "GET", "shard", 1)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_s3(url, backoff=QUICK)
        if how == "download":
            store.download("shard", tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == DATA
        else:
            assert store.read("shard", 0, 50_000) == DATA[:50_000]
        assert proxy.count("GET", "shard") == 2


@on_server
def test_answers_that_never_end_are_an_error_after_bounded_tries(s3, url, monkeypatch):
    open_store(url).put_if_absent("shard", DATA, {})
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 2.0}})
    with fault_proxy(s3.endpoint, nth(Drip(0.1), "GET", "shard")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_s3(url, backoff=replace(QUICK, attempts=1))
        with pytest.raises(StoreError, match=r"after 1 try: the answer was not complete after 2 s"):
            store.read("shard", 0, 10_000)


@on_server
@pytest.mark.parametrize("start", [0, 5, 500])
def test_another_range_than_was_asked_for_is_not_taken(proxied, start, tmp_path):
    proxy, store = proxied
    proxy.begin(nth(Shift(), "GET", "shard", 1, 2))
    assert store.read("shard", start, start + 50) == DATA[start : start + 50]
    assert proxy.count("GET", "shard") == 3
    proxy.begin(nth(Shift(), "GET", "shard"))
    with pytest.raises(
        StoreError, match=rf"asked for bytes {start}-{start + 49}, the answer says Content-Range"
    ):
        store.read("shard", start, start + 50)
    with pytest.raises(StoreError, match="asked for bytes 0-"):
        store.download("shard", tmp_path / "copy")


@pytest.mark.parametrize(
    ("said", "length"),
    [
        ("bytes 0-9/10", 300_000_000), ("bytes 0-8/10", 10), ("bytes 1-10/10", 10), ("bytes 0-19/20", 20),
        ("bytes 0-9/10", None), (None, 10), ("bytes 0-9/10", "ten"), ("bytes 0--1/10", 0), ("bytes */10", 10),
    ],
)  # fmt: skip
def test_headers_that_are_no_answer_to_the_question_are_refused(said, length):
    with pytest.raises(ConnectionError, match=r"asked for bytes 0-9, "):
        s3_reader.check_answer(said, length, 0, 10)


@pytest.mark.parametrize(
    ("said", "length"), [("bytes 5-14/99", 10), ("bytes 5-14/*", "10"), ("bytes 5-6/7", "2")]
)
def test_headers_of_the_range_or_of_all_that_is_left_are_let_through(said, length):
    s3_reader.check_answer(said, length, 5, 15)


@on_server
def test_a_fat_answer_is_not_read(url, monkeypatch):
    """A server that sends 300 MB for 10 bytes: none of them is taken."""
    sent = []

    def serve(listening):
        for _ in range(3):
            client, _ = listening.accept()
            with client, contextlib.suppress(OSError):
                client.recv(65536)
                client.sendall(
                    b"HTTP/1.1 206 x\r\nContent-Length: 300000000\r\nContent-Range: bytes 0-9/10\r\n\r\n"
                )
                for _ in range(300):
                    client.sendall(bytes(1_000_000))
                    sent.append(1)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        with pytest.raises(StoreError, match=r"after 3 tries: asked for bytes 0-9, .*'300000000'"):
            open_s3(url, backoff=QUICK).read("shard", 0, 10)
        thread.join(10)
    assert not thread.is_alive()
    assert len(sent) < 60  # what socket buffers hold


@on_server
def test_a_pinned_file_is_read_in_its_version_alone(s3, url, monkeypatch, tmp_path):
    store = open_s3(url, backoff=QUICK)
    store.put_if_absent("shard", DATA, {})
    store.put_if_absent("other", DATA, {})
    planned = store.info("shard")
    pinned = store.pinned([planned])
    below = open_s3(s3.url, backoff=QUICK).pinned([replace(planned, path=f"{url.rsplit('/', 1)[1]}/shard")])
    assert pinned.read("shard", 5, 10) == DATA[5:10] == below.sub(url.rsplit("/", 1)[1]).read("shard", 5, 10)
    store.replace("shard", DATA[::-1])
    found = store.info("shard")
    words = rf"/shard changed in mid-run: version {planned.version} when planned, version {found.version} "
    for how in (
        lambda: pinned.read("shard", 5, 10),
        lambda: pinned.download("shard", tmp_path / "copy"),
        lambda: below.sub(url.rsplit("/", 1)[1]).read("shard", 5, 10),
    ):
        with pytest.raises(RunFailed, match=words):
            how()
    assert store.read("shard", 5, 10) == DATA[::-1][5:10]
    assert pinned.read("other", 5, 10) == DATA[5:10]
    store.replace("shard", DATA)
    assert pinned.read("shard", 5, 10) == DATA[5:10]


@on_server
def test_a_pinned_file_is_read_in_its_version_through_s3fs_too(proxied):
    proxy, store = proxied
    pinned = store.pinned([store.info("shard")])
    proxy.begin(nth(Reply(403, "SomethingElse"), "GET", "shard", 1))
    assert pinned.read("shard", 5, 10) == DATA[5:10]
    store.replace("shard", DATA[::-1])
    proxy.begin(nth(Reply(403, "SomethingElse"), "GET", "shard", 1))
    with pytest.raises(RunFailed, match="changed in mid-run"):
        pinned.read("shard", 5, 10)
    assert proxy.count("GET", "shard") == 2


@on_server
def test_a_proxy_of_the_environment_is_used(s3, url, monkeypatch):
    open_store(url).put_if_absent("shard", DATA, {})
    with fault_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("http_proxy", proxy.endpoint)
        monkeypatch.setenv("no_proxy", "")
        assert open_store(url).read("shard", 0, 10) == DATA[:10]
        assert proxy.count("GET", "shard") == 1


def test_a_server_that_is_not_there_is_an_error_without_its_signature(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "geheim-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    with pytest.raises(
        StoreError, match=r"reading s3://bucket/x/a failed after 3 tries: .*127.0.0.1:9"
    ) as caught:
        open_s3("s3://bucket/x", backoff=QUICK).read("a", 0, 10)
    assert "geheim" not in f"{caught.value} {caught.value!r}"
    assert "ignature" not in f"{caught.value} {caught.value!r}"


@pytest.mark.parametrize(
    "endpoint", ["user:geheim@127.0.0.1:9", "https//user:geheim@h", "http:/user:geheim@h:9"]
)
@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.info("a"), lambda store: store.read("a", 0, 1), lambda store: store.list(),
        lambda store: store.put_if_absent("a", b"1", {}), lambda store: store.metadata("a"),
    ],
)  # fmt: skip
def test_an_endpoint_that_is_no_url_is_refused_and_not_shown(monkeypatch, endpoint, ask):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    with pytest.raises(StoreDenied, match="AWS_ENDPOINT_URL is no URL; write https://host") as caught:
        ask(open_s3("s3://bucket/x", backoff=QUICK))
    assert "geheim" not in f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"


CONFIG = """
[profile night]
region = eu-west-1
aws_access_key_id = NIGHT
aws_secret_access_key = secret
aws_session_token = token-of-the-night
s3 =
    addressing_style = {style}
"""


@pytest.mark.parametrize(
    ("style", "host", "path"),
    [
        ("virtual", "bucket.s3.eu-west-1.amazonaws.com", "/x/a"),
        ("path", "s3.eu-west-1.amazonaws.com", "/bucket/x/a"),
    ],
)
def test_profile_region_token_and_addressing_are_botocores(monkeypatch, tmp_path, style, host, path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(CONFIG.format(style=style))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "night")
    signed = open_s3("s3://bucket/x")._reader._signature("bucket/x/a")
    assert (urlsplit(signed.url).hostname, urlsplit(signed.url).path) == (host, path)
    assert "Credential=NIGHT/" in signed.headers["Authorization"]
    assert "/eu-west-1/s3/aws4_request" in signed.headers["Authorization"]
    assert signed.headers["X-Amz-Security-Token"] == "token-of-the-night"


def test_without_credentials_nothing_is_sent(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreDenied, match="was refused: Unable to locate credentials"):
        open_store("s3://bucket/x").read("a", 0, 10)


class OldestRequest(AWSPreparedRequest):
    """As botocore 1.36 has it, the oldest that is allowed: without a context."""

    def __init__(self, method, url, headers, body, stream_output):
        super().__init__(method, url, headers, body, stream_output)


@on_server
def test_a_range_is_asked_for_as_the_oldest_botocore_takes_it(url, monkeypatch):
    monkeypatch.setattr(s3_reader, "AWSPreparedRequest", OldestRequest)
    store = open_store(url)
    store.put_if_absent("shard", DATA, {})
    assert store._reader.read(store._key("shard"), 3, 8) == DATA[3:8]
