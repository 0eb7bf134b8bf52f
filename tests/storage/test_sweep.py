"""Listing and removal on a disk: everything is seen, no link is followed, nothing outside is touched."""

from __future__ import annotations

import os
import re
import time

import pytest

from ray_merge.errors import Refusal, StoreDenied, StoreError
from ray_merge.storage import sweep
from ray_merge.storage.store import open_store
from ray_merge.storage.sweep import open_sweeper


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out" / "a" / "b").mkdir(parents=True)
    (tmp_path / "out" / "a" / "b" / ".tmp-1").write_bytes(b"12345")
    (tmp_path / "out" / "plain").write_bytes(b"1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "treasure").write_bytes(b"keep me")
    return tmp_path / "out"


def paths(sweeper, below=""):
    return [entry.path for entry in sweeper.entries(below)]


def test_everything_but_folders_is_listed_with_bytes_and_age(folder):
    os.utime(folder / "plain", (time.time() - 3600, time.time() - 3600))
    found = {entry.path: entry for entry in open_sweeper(str(folder)).entries()}
    assert list(found) == ["a/b/.tmp-1", "plain"]
    assert found["a/b/.tmp-1"].n_bytes == 5
    assert found["a/b/.tmp-1"].age_seconds < 60
    assert 3590 < found["plain"].age_seconds < 3700
    assert paths(open_sweeper(str(folder)), "a") == ["a/b/.tmp-1"]
    assert paths(open_sweeper(str(folder)), "nowhere") == []


def test_links_are_entries_and_nothing_behind_them_is(folder):
    (folder / "door").symlink_to(folder.parent / "elsewhere")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to("nowhere")
    assert paths(open_sweeper(str(folder))) == ["a/b/.tmp-1", "a/loop", "dangling", "door", "plain"]
    assert paths(open_sweeper(str(folder)), "door") == []


def test_removal_takes_the_file_and_the_folders_that_are_empty_then(folder):
    sweeper = open_sweeper(str(folder))
    sweeper.remove("a/b/.tmp-1")
    sweeper.remove("a/b/.tmp-1")  # gone already
    assert sorted(path.name for path in folder.iterdir()) == ["plain"]
    sweeper.remove("plain")
    assert list(folder.iterdir()) == []


def test_removing_a_link_removes_the_link(folder):
    (folder / "door").symlink_to(folder.parent / "elsewhere")
    (folder / "file").symlink_to(folder.parent / "elsewhere" / "treasure")
    sweeper = open_sweeper(str(folder))
    with pytest.raises(StoreError, match="door/treasure"):
        sweeper.remove("door/treasure")
    sweeper.remove("door")
    sweeper.remove("file")
    assert paths(sweeper) == ["a/b/.tmp-1", "plain"]
    assert (folder.parent / "elsewhere" / "treasure").read_bytes() == b"keep me"


@pytest.mark.parametrize(
    "path", ["door/treasure", "../elsewhere/treasure", "a/../../elsewhere/treasure", "a/.."]
)
def test_no_way_leads_out_of_the_folder(folder, path):
    open_sweeper(str(folder)).remove(path)  # names nothing, which is as good as gone
    assert (folder.parent / "elsewhere" / "treasure").read_bytes() == b"keep me"


def test_a_folder_that_becomes_a_link_after_the_listing_is_not_entered(folder):
    sweeper = open_sweeper(str(folder))
    assert "a/b/.tmp-1" in paths(sweeper)
    (folder.parent / "elsewhere" / ".tmp-1").write_bytes(b"keep me too")
    (folder / "a" / "b" / ".tmp-1").unlink()
    (folder / "a" / "b").rmdir()
    (folder / "a" / "b").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(StoreError, match=r"removing .*a/b/\.tmp-1"):
        sweeper.remove("a/b/.tmp-1")
    assert (folder.parent / "elsewhere" / ".tmp-1").exists()


def test_the_folder_itself_may_be_reached_by_a_link(folder):
    (folder.parent / "link").symlink_to(folder)
    sweeper = open_sweeper(str(folder.parent / "link"))
    sweeper.remove("plain")
    assert not (folder / "plain").exists()


def test_ages_are_those_of_the_disks_own_clock(folder, monkeypatch):
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + 2 * 86400)
    assert all(entry.age_seconds < 600 for entry in open_sweeper(str(folder)).entries())
    assert paths(open_sweeper(str(folder))) == ["a/b/.tmp-1", "plain"]


def test_where_nothing_may_be_written_this_machines_clock_has_to_do(folder, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ray_merge.storage.sweep.temporary", denied)
    assert all(entry.age_seconds < 600 for entry in open_sweeper(str(folder)).entries())


def test_empty_folders_go_by_name_and_age_and_no_others(folder):
    for name in ("x/attempts/1", "x/attempts/2", "y/attempts/1", "z"):
        (folder / name).mkdir(parents=True)
    (folder / "x" / "attempts" / "2" / "half").write_bytes(b"")
    (folder / "door").symlink_to(folder / "y")
    sweeper = open_sweeper(str(folder))
    sweeper.remove_empty(re.compile(r".*/attempts(/\d)?"), 3600)
    assert (folder / "y" / "attempts" / "1").is_dir()
    sweeper.remove_empty(re.compile(r".*/attempts(/\d)?"), 0)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}
    assert left - {"a", "a/b"} == {"x", "x/attempts", "x/attempts/2", "y", "z", "door"}


def test_what_cannot_be_tidied_is_refused(tmp_path):
    with pytest.raises(Refusal, match="no folder that exists"):
        open_sweeper(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Refusal, match="no folder that exists"):
        open_sweeper(str(tmp_path / "file"))
    with pytest.raises(Refusal, match=r"only local folders and s3://"):
        open_sweeper("memory://x")


def test_a_folder_of_far_too_many_files_is_not_walked_to_its_end(folder, monkeypatch):
    monkeypatch.setattr(sweep, "MAX_LISTED", 2)
    with pytest.raises(StoreDenied, match="more than 2 files"):
        open_sweeper(str(folder)).entries()


def test_a_store_has_no_way_to_remove_anything(folder):
    names = [name.lower() for name in dir(open_store(str(folder)))]
    assert [name for name in names if any(word in name for word in ("remove", "delete", "unlink"))] == []
