from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray_merge.errors import StoreError
from ray_merge.storage import digest
from ray_merge.storage.digest import DigestCache, sha256_file


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights" * 1_000)
    return path


@pytest.fixture
def cache(tmp_path):
    return DigestCache(tmp_path / "digests", settle_seconds=-1.0)


def entries(cache):
    return sorted(cache._folder.glob("*"))


def test_the_digest_is_that_of_the_whole_file(file, tmp_path):
    assert sha256_file(file) == sha(b"weights" * 1_000)
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_file(tmp_path / "empty") == sha(b"")


def test_a_file_is_hashed_once_also_by_another_process_and_under_another_name(
    file, cache, monkeypatch, tmp_path
):
    first = cache.sha256(file)
    monkeypatch.setattr(digest, "sha256_file", lambda path: pytest.fail(f"hashed {path} again"))
    link = tmp_path / "snapshot"
    link.symlink_to(file)
    assert DigestCache(cache._folder).sha256(link) == first == sha(b"weights" * 1_000)


def test_other_bytes_of_the_same_length_and_time_get_another_digest(file, cache):
    before = file.stat()
    old = cache.sha256(file)
    file.write_bytes(b"WEIGHTS" * 1_000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.sha256(file) == sha(b"WEIGHTS" * 1_000) != old


def test_no_damaged_entry_is_believed_and_it_is_rewritten(file, cache):
    right = cache.sha256(file)
    (entry,) = entries(cache)
    good = entry.read_bytes()
    document = json.loads(good)
    damaged = [good[:length] for length in range(len(good))]
    damaged += [b"\xff\xfe", b"[]", b"[" * 100_000, json.dumps({**document, "sha256": "0" * 63}).encode()]
    damaged += [
        json.dumps({**document, "sha256": 5}).encode(),
        json.dumps({**document, "file": "else"}).encode(),
    ]
    for bad in damaged:
        entry.write_bytes(bad)
        assert cache.sha256(file) == right
        assert json.loads(entry.read_bytes()) == document


def test_a_file_that_was_just_written_is_not_remembered(file, tmp_path):
    cache = DigestCache(tmp_path / "digests")
    assert cache.sha256(file) == sha(b"weights" * 1_000)
    assert entries(cache) == []


def test_a_file_that_changes_while_it_is_hashed_is_an_error(file, cache, monkeypatch):
    def change(path):
        file.write_bytes(b"other")
        return "0" * 64

    monkeypatch.setattr(digest, "sha256_file", change)
    with pytest.raises(StoreError, match="changed meanwhile"):
        cache.sha256(file)
    assert entries(cache) == []


def test_many_writers_at_once_leave_one_whole_entry(file, cache):
    with ThreadPoolExecutor(8) as threads:
        digests = set(
            threads.map(lambda _: DigestCache(cache._folder, settle_seconds=-1.0).sha256(file), range(64))
        )
    assert digests == {sha(b"weights" * 1_000)}
    (entry,) = entries(cache)
    assert json.loads(entry.read_bytes())["sha256"] in digests


def test_a_missing_file_is_an_ordinary_error(cache, tmp_path):
    with pytest.raises(FileNotFoundError):
        cache.sha256(tmp_path / "nothing")


def test_a_folder_that_takes_no_file_is_named_with_the_way_out(file, tmp_path):
    (tmp_path / "digests").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"digests in .*/digests failed .*--cache-dir names another folder"):
        DigestCache(tmp_path / "digests", settle_seconds=-1.0).sha256(file)
