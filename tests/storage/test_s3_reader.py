"""The GET that S3Store sends itself: what s3fs would have sent, and every error as s3fs would have told it."""

from __future__ import annotations

import os
import random
import uuid
from dataclasses import replace
from urllib.parse import urlsplit

import fsspec
import pytest

from fault_proxy import Hang, Reply, fault_proxy, nth
from ray_merge.errors import RayMergeError, StoreDenied, StoreError
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
