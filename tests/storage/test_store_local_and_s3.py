"""The promises of `Store`, held to by both stores that are written to."""

from __future__ import annotations

import os
import random
import threading
import uuid
from pathlib import Path

import pytest

from ray_merge.errors import Refusal, StoreError
from ray_merge.storage.s3 import open_s3
from ray_merge.storage.store import Store, open_store

PART = 5 << 20
"""S3's smallest part: 6 MiB go up in two."""


@pytest.fixture(scope="module")
def bucket(s3):
    """One client for all tests here: making one takes 0.1 s."""
    return open_s3(s3.url), open_s3(s3.url, multipart_bytes=1 << 20, part_bytes=PART)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def stores(request, tmp_path) -> tuple[Store, Store]:
    """The same new folder twice; on S3 the second one uploads in parts from 1 MiB on."""
    if request.param == "local":
        return open_store(str(tmp_path / "store")), open_store(str(tmp_path / "store"))
    folder = uuid.uuid4().hex
    whole, in_parts = request.getfixturevalue("bucket")
    return whole.sub(folder), in_parts.sub(folder)


@pytest.fixture
def store(stores) -> Store:
    return stores[0]


@pytest.fixture
def parts(stores) -> Store:
    return stores[1]


@pytest.fixture
def url(store) -> str:
    return store.url


def test_nothing_is_in_a_folder_that_was_never_written(store):
    assert list(store.list()) == []
    assert list(store.list("a/b")) == []
    assert store.info("a") is None


def test_what_was_put_is_there_and_is_never_overwritten(store):
    assert store.put_if_absent("run/MANIFEST.json", b"first", {"sha256": "1"}) is True
    before = store.info("run/MANIFEST.json")
    assert store.put_if_absent("run/MANIFEST.json", b"second", {"sha256": "2"}) is False
    assert store.read("run/MANIFEST.json") == b"first"
    assert store.info("run/MANIFEST.json") == before
    assert (before.path, before.n_bytes) == ("run/MANIFEST.json", 5)


def test_an_existence_check_is_never_stale(url, store):
    assert store.info("late") is None
    assert list(store.list()) == []
    assert open_store(url).put_if_absent("late", b"x", {})
    assert store.info("late") is not None
    assert [info.path for info in store.list()] == ["late"]
    assert store.put_if_absent("late", b"y", {}) is False


def test_listing_is_recursive_sorted_and_keeps_to_the_folder(store):
    for name in ("b", "a/z", "a/b/c", "ab", "a.txt"):
        store.put_if_absent(name, name.encode(), {})
    assert [info.path for info in store.list()] == sorted(["b", "a/z", "a/b/c", "ab", "a.txt"])
    assert [info.path for info in store.list("a")] == ["a/b/c", "a/z"]
    assert [info.path for info in store.sub("a").list()] == ["b/c", "z"]
    assert {info.path: info for info in store.list()}["a/z"] == store.info("a/z")


def test_a_folder_is_no_object(store):
    store.put_if_absent("a/b/c", b"x", {})
    assert store.info("a") is None
    assert store.info("a/b") is None
    with pytest.raises(StoreError):
        store.read("a/b")


def test_names_of_sweeps_and_pairs_are_ordinary_names(store):
    names = ["scale/lambda=0.2,density=0.5/a b", "pairs/mnli__stsb/100%41", "x/plus+and&more#1"]
    for name in names:
        assert store.put_if_absent(name, name.encode(), {})
    assert [info.path for info in store.list()] == sorted(names)
    for name in names:
        assert store.read(name) == name.encode()


def test_a_sub_store_is_the_same_place(url, store):
    store.sub("a/b").put_if_absent("c", b"x", {})
    assert store.read("a/b/c") == b"x"
    assert store.sub("a").sub("b").url == f"{url}/a/b" == open_store(f"{url}/a/b/").url


def test_metadata_comes_back_or_is_empty_as_the_store_says(store):
    given = {"sha256": "ab" * 32, "merge-id": "Mixed Case 1.0"}
    store.put_if_absent("a", b"x", given)
    assert store.metadata("a") == ({} if store.local_root else given)
    with pytest.raises(StoreError, match="no such"):
        store.metadata("nothing")


@pytest.mark.parametrize("n_bytes", [0, 1, (1 << 20) + 1, 6 << 20])
@pytest.mark.parametrize("in_parts", [False, True])
def test_bytes_and_files_of_any_length_arrive_whole(stores, tmp_path, n_bytes, in_parts):
    parts = stores[in_parts]
    data = random.Random(n_bytes).randbytes(n_bytes)
    (tmp_path / "file").write_bytes(data)
    for name, source in (("bytes", data), ("file", tmp_path / "file")):
        assert parts.put_if_absent(name, source, {"sha256": "1"}) is True
        assert parts.put_if_absent(name, source, {"sha256": "2"}) is False
        assert parts.info(name).n_bytes == n_bytes
        assert parts.read(name) == data
        if parts.local_root is None:
            assert parts.metadata(name) == {"sha256": "1"}
    assert [info.path for info in parts.list()] == ["bytes", "file"]


def test_the_version_follows_the_bytes(store):
    store.put_if_absent("a", b"one", {})
    store.put_if_absent("b", b"two", {})
    assert store.info("a").version != store.info("b").version
    assert store.info("a").version == store.info("a").version


@pytest.mark.parametrize("n_bytes", [100, 6 << 20])
def test_of_eight_writers_at_once_exactly_one_wins_and_its_bytes_stay(store, n_bytes):
    rounds = 2 if n_bytes < PART else 1  # SeaweedFS makes writers of one key wait in steps of 1 s
    for round_ in range(rounds):
        start = threading.Barrier(8)
        won = [None] * 8

        def write(writer, name=f"race-{round_}", start=start, won=won):
            data = bytes([writer]) * n_bytes
            start.wait()
            won[writer] = store.put_if_absent(name, data, {"sha256": str(writer)})

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False] * 7 + [True]
        winner = won.index(True)
        assert store.read(f"race-{round_}") == bytes([winner]) * n_bytes
    assert len(store.list()) == rounds


def test_ranges_come_back_exactly_and_in_the_order_asked(store):
    rng = random.Random(7)
    data = rng.randbytes(3_000_000)
    store.put_if_absent("w", data, {})
    ranges = [
        (start, min(len(data), start + rng.choice([0, 1, 500, 400_000])))
        for start in rng.sample(range(2_999_999), 60)
    ]
    assert list(store.read_ranges("w", ranges)) == [data[start:end] for start, end in ranges]
    assert store.read("w", 5, 17) == data[5:17]
    assert store.read("w", 2_999_990) == data[2_999_990:]
    assert store.read("w", 8, 8) == b""
    assert list(store.read_ranges("w", [])) == []
    with pytest.raises(ValueError, match="no byte range"):
        store.read("w", 9, 8)


def test_a_missing_object_is_an_error_that_names_it(url, store, tmp_path):
    calls = [
        lambda: store.read("gone"),
        lambda: store.read("gone", 0, 10),
        lambda: store.read_ranges("gone", [(0, 10)]),
        lambda: store.download("gone", tmp_path / "copy"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=f"{url}/gone failed after 1 try: [Nn]o such"):
            call()
    assert not (tmp_path / "copy").exists()


def test_an_object_that_shrank_gives_an_error_and_never_fewer_bytes(request, store):
    store.put_if_absent("w", bytes(1000), {})
    if store.local_root:
        os.truncate(store.local_root / "w", 400)
    else:
        replace_object(request.getfixturevalue("s3"), store, "w", bytes(400))
    for start, end in ((0, 1000), (399, 401), (400, 401), (700, 800)):
        with pytest.raises(StoreError, match=r"truncated or replaced|shorter than asked for"):
            store.read("w", start, end)
        with pytest.raises(StoreError):
            store.read_ranges("w", [(0, 10), (start, end)])
    assert store.read("w") == bytes(400)


def test_a_report_is_replaced_by_a_longer_and_by_a_shorter_one(store):
    for data in (b"report", b"a longer report", b"short"):
        store.replace("ray_merge/report.html", data)
        assert store.read("ray_merge/report.html") == data
    assert [info.path for info in store.list()] == ["ray_merge/report.html"]
    with pytest.raises(Refusal, match="not a relative path"):
        store.replace("../report.html", b"x")


def replace_object(server, store, path, data):
    from s3_server import make_client

    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    make_client(server.endpoint).put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=data)


def test_a_download_replaces_the_target_whole_and_leaves_no_other_file(store, tmp_path):
    data = random.Random(1).randbytes(2_000_000)
    store.put_if_absent("w", data, {})
    target = tmp_path / "new" / "folder" / "file"
    store.download("w", target)
    assert target.read_bytes() == data
    store.put_if_absent("v", b"", {})
    store.download("v", target)
    assert target.read_bytes() == b""
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_failed_download_leaves_the_old_target_and_no_other_file(store, tmp_path, monkeypatch):
    store.put_if_absent("w", b"new", {})
    target = tmp_path / "copies" / "file"
    target.parent.mkdir()
    target.write_bytes(b"old")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises((StoreError, OSError), match="No space left"):
        store.download("w", target)
    assert target.read_bytes() == b"old"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_source_file_that_is_missing_leaves_nothing(parts, tmp_path):
    with pytest.raises((StoreError, OSError), match="No such file"):
        parts.put_if_absent("w", Path(tmp_path / "nothing"), {})
    assert list(parts.list()) == []


def test_a_path_out_of_the_folder_is_refused(store):
    for path in ("../x", "/x", "a/../../x"):
        with pytest.raises(Refusal, match="not a relative path"):
            store.put_if_absent(path, b"", {})
        with pytest.raises(Refusal, match="not a relative path"):
            store.read(path)
