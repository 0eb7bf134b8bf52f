"""`gc` on a real S3 server: uploads that kill -9 left, merges without a manifest, nothing beside them."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid

import pytest

import ray_merge
from fault_proxy import Hang, fault_proxy, nth
from ray_merge.storage.commit import MANIFEST, RECIPE
from ray_merge.storage.s3_sweep import S3Sweeper
from ray_merge.storage.store import open_store
from ray_merge.storage.sweep import open_sweeper
from s3_server import BUCKET, make_client

pytestmark = pytest.mark.s3

PUT = """
import sys
from ray_merge.storage.s3 import open_s3
open_s3(sys.argv[1], multipart_bytes=1, part_bytes=5 << 20).put_if_absent(sys.argv[2], bytes(6 << 20), {})
"""


@pytest.fixture
def url(s3):
    return f"{s3.url}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def client(s3):
    return make_client(s3.endpoint)


SHARD = "model-00002-of-00002.safetensors"


def put_killed(s3, url, monkeypatch, name=f"m/{SHARD}") -> None:
    """All parts are there and the completion is on its way when the process is killed."""
    with fault_proxy(s3.endpoint) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.begin(nth(Hang(), "POST", "uploadId="))
        with subprocess.Popen([sys.executable, "-c", PUT, url, name]) as child:
            assert proxy.hanging.wait(30)
            child.send_signal(signal.SIGKILL)
        proxy.begin(lambda call: None)


def uploads(client, url) -> list[str]:
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    found = client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
    return [one["Key"].removeprefix(prefix) for one in found]


def put_merge(url: str, name: str, *, complete: bool) -> None:
    store = open_store(f"{url}/{name}")
    store.put_if_absent(RECIPE, f"# merge id: {'ab' * 32}\nmerges: [{{name: {name}}}]\n".encode(), {})
    store.put_if_absent("model-00001-of-00002.safetensors", b"12345", {})
    if complete:
        store.put_if_absent(MANIFEST, b"{}", {})


def paths(url: str) -> list[str]:
    return [info.path for info in open_store(url).list()]


def test_an_upload_abandoned_by_kill_9_is_found_kept_while_young_and_given_up(s3, url, client, monkeypatch):
    put_killed(s3, url, monkeypatch)
    put_killed(s3, f"{url}2", monkeypatch)  # a neighbour whose name begins alike
    put_merge(url, "m", complete=True)
    before = paths(url)
    (young,) = ray_merge.gc(url, remove=True).leftovers
    assert (young.kind, young.path, young.files, young.n_bytes) == ("upload", f"m/{SHARD}", 2, 6 << 20)
    assert young.kept
    assert uploads(client, f"{url}/") == [f"m/{SHARD}"]
    (listed,) = ray_merge.gc(url, older_than=0).leftovers
    assert not listed.kept
    assert uploads(client, f"{url}/") == [f"m/{SHARD}"]
    (gone,) = ray_merge.gc(url, remove=True, older_than=0).leftovers
    assert gone.removed
    assert uploads(client, f"{url}/") == []
    assert uploads(client, f"{url}2/") == [f"m/{SHARD}"]
    assert paths(url) == before
    assert ray_merge.gc(url, remove=True, older_than=0).leftovers == ()


def test_the_upload_of_a_large_head_is_found_too(s3, url, monkeypatch):
    put_merge(url, "m", complete=True)
    put_killed(s3, url, monkeypatch, "m/model-head.safetensors")
    (listed,) = ray_merge.gc(url, older_than=0).leftovers
    assert (listed.kind, listed.path) == ("upload", "m/model-head.safetensors")


def test_a_merge_without_a_manifest_goes_and_the_one_beside_it_stays(url):
    put_merge(url, "done", complete=True)
    put_merge(url, "dead", complete=False)
    put_merge(f"{url}2", "dead", complete=False)
    open_store(url).put_if_absent("notes.txt", b"mine", {})
    open_store(url).put_if_absent(f".ray_merge/moments/{'cd' * 32}.safetensors", b"1", {})
    before = paths(url)
    (young,) = ray_merge.gc(url, remove=True).leftovers
    assert young.kept
    assert paths(url) == before
    (gone,) = ray_merge.gc(url, remove=True, older_than=0).leftovers
    assert (gone.kind, gone.path, gone.files, gone.removed) == ("merge", "dead", 2, True)
    assert paths(url) == [path for path in before if not path.startswith("dead/")]
    assert paths(f"{url}2") != []
    ray_merge.gc(url, remove=True, older_than=0, state=True)
    assert ".ray_merge" not in " ".join(paths(url))


def test_ages_are_counted_by_the_servers_clock(url, monkeypatch):
    put_merge(url, "dead", complete=False)
    real = __import__("time").time
    monkeypatch.setattr("time.time", lambda: real() + 2 * 86400)
    (left,) = ray_merge.gc(url, remove=True).leftovers
    assert left.kept
    assert left.age_seconds < 60


@pytest.mark.parametrize("parts", [0, 1])
def test_a_store_that_does_not_tell_when_an_upload_began_has_a_young_one(url, client, monkeypatch, parts):
    begun = client.create_multipart_upload(
        Bucket=BUCKET, Key=f"{url.removeprefix(f's3://{BUCKET}/')}/m/{SHARD}"
    )
    for number in range(1, parts + 1):
        client.upload_part(
            **{name: begun[name] for name in ("Bucket", "Key", "UploadId")}, PartNumber=number, Body=b"12345"
        )
    inner = S3Sweeper._pages

    def without(*arguments):
        for page in inner(*arguments):
            for one in page.get("Uploads", ()):
                one.pop("Initiated", None)
            yield page

    monkeypatch.setattr(S3Sweeper, "_pages", without)
    (found,) = open_sweeper(url).uploads()
    assert (found.path, found.parts, found.n_bytes) == (f"m/{SHARD}", parts, 5 * parts)
    assert 0 <= found.age_seconds < 60
    client.abort_multipart_upload(**{name: begun[name] for name in ("Bucket", "Key", "UploadId")})


def test_thousands_of_objects_are_listed_in_pages(url, client):
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    for number in range(1003):
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{number:04}", Body=b"")
    found = open_sweeper(url).entries()
    assert [entry.path for entry in found] == [f"{number:04}" for number in range(1003)]


def test_rights_that_are_missing_are_a_refusal(url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ray_merge.Refusal, match="was refused"):
        ray_merge.gc(url, remove=True)


@pytest.mark.parametrize(
    "name", ["datasets/theirs.parquet", f"datasets/{SHARD}", "m/datasets/theirs.parquet"]
)
def test_uploads_of_other_programs_are_left_alone(s3, url, client, monkeypatch, name):
    put_merge(url, "m", complete=True)
    put_killed(s3, url, monkeypatch, name)
    assert ray_merge.gc(url, remove=True, older_than=0).leftovers == ()
    assert uploads(client, f"{url}/") == [name]
    put_killed(s3, url, monkeypatch, ".ray_merge/moments/x.safetensors")
    (gone,) = ray_merge.gc(url, remove=True, older_than=0).leftovers
    assert (gone.kind, gone.path) == ("upload", ".ray_merge/moments/x.safetensors")
