"""S3 again: requests and answers that are cut, answers that lie, and what opening many stores costs."""

from __future__ import annotations

import resource
import uuid

import fsspec
import pytest

from fault_proxy import CutRequest, Halve, Reply, Reset, Shift, Stale, fault_proxy, nth
from random_faults import KINDS, RandomFaults
from ray_merge.errors import StoreDenied, StoreError
from ray_merge.storage import s3 as s3_module
from ray_merge.storage.retry import Backoff
from ray_merge.storage.s3 import open_s3

pytestmark = pytest.mark.s3

QUICK = Backoff(attempts=3, first_seconds=0.01, limit_seconds=0.01)
DATA = b"0123456789" * 10_000


@pytest.fixture(scope="module")
def proxy(s3):
    with fault_proxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def faulty(s3, proxy, monkeypatch):
    """Gives the proxy a rule; returns it, and a new folder as seen through it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    store = open_s3(f"{s3.url}/{uuid.uuid4().hex}", backoff=QUICK)

    def start(rule):
        proxy.begin(rule)
        return proxy, store

    yield start
    proxy.begin(lambda call: None)


def test_a_write_that_is_reset_in_mid_body_leaves_nothing_and_is_sent_again(faulty):
    proxy, store = faulty(nth(CutRequest(), "PUT", "shard", 1))
    assert store.put_if_absent("shard", DATA, {}) is True
    assert proxy.count("PUT", "shard") == 2
    assert store.read("shard") == DATA


def test_writes_that_are_always_cut_leave_no_object(faulty):
    _, store = faulty(nth(CutRequest(), "PUT", "shard"))
    with pytest.raises(StoreError, match=r"writing .*/shard failed after 3 tries"):
        store.put_if_absent("shard", DATA, {})
    assert store.info("shard") is None


@pytest.fixture
def little_room():
    """Files of this process end after half of DATA: a write of more does what fits, as on a disk that gets full."""
    old, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) // 2, most))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (old, most))


def test_a_download_that_finds_no_room_says_so_at_once(faulty, little_room, tmp_path):
    proxy, store = faulty(lambda call: None)
    store.put_if_absent("shard", DATA, {})
    with pytest.raises((StoreError, OSError), match="File too large"):
        store.download("shard", tmp_path / "copy")
    assert proxy.count("GET", "shard") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("fault", [Reset(), Halve(), Shift()])
def test_half_an_answer_is_never_taken_for_the_whole(faulty, fault):
    _, store = faulty(nth(fault, "GET", "shard", 1, 2))
    store.put_if_absent("shard", DATA, {})
    assert store.read("shard", 5, 90_005) == DATA[5:90_005]


def test_a_look_up_that_is_refused_is_not_asked_again(faulty):
    proxy, store = faulty(nth(Reply(403, "AccessDenied"), "HEAD", "shard"))
    with pytest.raises(StoreDenied, match="403"):
        store.info("shard")
    assert proxy.count("HEAD", "shard") == 1
    assert [*store.list()] == []  # the answer had no body that would have been taken for this one


def test_a_replacement_is_tried_as_often_as_every_other_request(faulty):
    proxy, store = faulty(nth(Reply(503, "SlowDown"), "PUT", "report", 1, 2))
    store.replace("report", DATA)
    assert proxy.count("PUT", "report") == 3
    assert store.read("report") == DATA
    proxy.begin(nth(Reply(503, "SlowDown"), "PUT", "report"))
    with pytest.raises(StoreError, match="failed after 3 tries"):
        store.replace("report", b"short")
    assert proxy.count("PUT", "report") == 3


def test_a_listing_cut_in_the_middle_is_asked_for_again(faulty):
    _, store = faulty(nth(Halve(), "GET", "list-type=2", 1))
    store.put_if_absent("shard", DATA, {})
    assert [info.path for info in store.list()] == ["shard"]


def test_a_stale_listing_hides_an_object_from_the_listing_and_not_from_the_look(faulty):
    _, store = faulty(nth(Stale(), "GET", "list-type=2"))
    assert list(store.list()) == []
    store.put_if_absent("shard", DATA, {})
    assert list(store.list()) == []
    found = store.info("shard")
    assert found is not None
    assert found.n_bytes == len(DATA)


def test_a_refusal_of_a_write_where_nothing_is_there_is_tried_again(faulty):
    proxy, store = faulty(nth(Reply(412, "PreconditionFailed"), "PUT", "shard", 1))
    assert store.put_if_absent("shard", DATA, {}) is True
    assert proxy.count("PUT", "shard") == 2


def test_a_store_that_always_refuses_although_nothing_is_there_is_an_error(faulty):
    _, store = faulty(nth(Reply(412, "PreconditionFailed"), "PUT", "shard"))
    with pytest.raises(StoreError, match=r"failed after 3 tries: refused, but nothing is there"):
        store.put_if_absent("shard", DATA, {})


def test_clients_share_the_tables_of_botocore_and_no_credentials(s3):
    first, second = (open_s3(f"{s3.url}/{name}")._fs for name in ("a", "b"))
    assert first.session is not second.session
    tables = [fs.session.get_component("data_loader") for fs in (first, second)]
    assert tables[0] is tables[1] is s3_module._tables()


def test_a_profile_in_fsspecs_own_configuration_is_left_to_s3fs(monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", {"profile": "nightly"})
    assert open_s3("s3://bucket/folder")._fs.session is None


def test_random_faults_are_the_same_for_the_same_seed_and_meet_the_stated_share():
    from fault_proxy import Call

    calls = [Call("GET" if i % 2 else "PUT", f"/tests/key{i % 700}", i) for i in range(2000)]
    rules = [RandomFaults(tuple(KINDS), 0.2, seed) for seed in ("a", "a", "b")]
    same, again, other = ([type(rule(call)).__name__ for call in calls] for rule in rules)
    assert same == again != other
    # 2000 requests at 20 %: 400, with a standard deviation of 18.
    assert 310 < sum(rules[0].made.values()) < 490
