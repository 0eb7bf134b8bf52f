from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ray_merge.errors import StoreDenied, StoreError, StoreUnfit
from ray_merge.storage.local import write_at
from ray_merge.storage.store import open_store


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".tmp-*")]


def test_a_finished_file_is_published_without_a_second_copy(store, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.write_bytes(b"x" * 1000)
    assert store.put_if_absent("w", scratch, {})
    assert os.path.samefile(scratch, store.local_root / "w")
    scratch.unlink()
    assert store.read("w") == b"x" * 1000


def test_a_file_of_another_file_system_is_copied_first(store, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.write_bytes(b"x" * 1000)
    link = os.link

    def other_device(source, target):
        if Path(source) == scratch:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", other_device)
    assert store.put_if_absent("w", scratch, {}) is True
    assert store.put_if_absent("w", scratch, {}) is False
    assert not os.path.samefile(scratch, store.local_root / "w")
    assert store.read("w") == b"x" * 1000
    assert temporaries(store.local_root) == []


@pytest.mark.parametrize("source_is_file", [True, False])
def test_a_file_system_without_hard_links_is_unfit(store, tmp_path, monkeypatch, source_is_file):
    def no_links(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "scratch").write_bytes(b"x")
    with pytest.raises(StoreUnfit, match="no hard links"):
        store.put_if_absent("w", tmp_path / "scratch" if source_is_file else b"x", {})
    assert temporaries(tmp_path) == []
    assert list(store.list()) == []


def test_a_full_disk_leaves_nothing_and_says_so(store, monkeypatch):
    def disk_full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    store.local_root.mkdir()
    with pytest.raises(StoreError, match=r"writing .*/w failed after 1 try: No space left"):
        store.put_if_absent("w", b"x", {})
    assert [*store.local_root.iterdir()] == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_without_rights_is_refused_with_the_reason(store, monkeypatch, code):
    def denied(path, mode=0o777, exist_ok=False):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StoreDenied, match=f"writing .*/w was refused: {os.strerror(code)}"):
        store.put_if_absent("w", b"x", {})


def test_data_is_on_the_disk_before_its_name_is(store, monkeypatch, tmp_path):
    events = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(os, "link", lambda a, b: (events.append("link"), link(a, b)))
    store.local_root.mkdir()
    (tmp_path / "scratch").write_bytes(b"x")
    store.put_if_absent("file", tmp_path / "scratch", {})
    assert events == [str(tmp_path / "scratch"), "link", store.url]
    events.clear()
    store.put_if_absent("bytes", b"x", {})
    assert ".tmp-" in events[0]
    assert events[1:] == ["link", store.url]


def test_links_are_followed_but_not_in_circles_and_not_into_nothing(store, tmp_path):
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    snapshot = store.local_root / "snapshot"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "dangling").symlink_to(tmp_path / "nothing")
    (snapshot / "self").symlink_to(snapshot / "self")
    (snapshot / "circle").symlink_to(store.local_root)
    (store.local_root / "other").symlink_to(blob.parent)
    assert [info.path for info in store.list()] == ["other/abc", "snapshot/model.safetensors"]
    assert store.info("snapshot/dangling") is None
    assert store.read("snapshot/model.safetensors") == b"weights"


def test_unfinished_files_are_neither_listed_nor_found(store):
    store.put_if_absent("w", b"x", {})
    (store.local_root / ".tmp-1-ab").write_bytes(b"half")
    assert [info.path for info in store.list()] == ["w"]
    assert store.info(".tmp-1-ab") is None


def test_a_file_in_the_place_of_a_folder_is_refused(store):
    store.put_if_absent("a", b"x", {})
    assert store.info("a/b") is None
    assert list(store.list("a")) == []
    for path in ("a/b", "a/b/c"):
        with pytest.raises(StoreDenied, match="Not a directory"):
            store.put_if_absent(path, b"y", {})


def test_a_folder_of_thousands_of_files_lists_in_one_pass(store):
    store.local_root.mkdir()
    for number in range(2000):
        (store.local_root / f"{number:04}").touch()
    assert [info.path for info in store.list()] == [f"{number:04}" for number in range(2000)]


KILLED = """
import os, sys, time
from pathlib import Path
from ray_merge.storage.store import open_store
root, source, when, action = sys.argv[1:]
module, name = {"before link": (os, "link"), "after link": (Path, "unlink"), "before rename": (os, "replace")}[when]
def hang(*args, **kwargs):
    print("here", flush=True)
    time.sleep(60)
setattr(module, name, hang)
store = open_store(root)
if action == "put":
    store.put_if_absent("new", b"x" * 1000, {})
else:
    store.download("old", Path(root) / "copy")
"""


@pytest.mark.parametrize(
    ("when", "action", "listed"),
    [
        ("before link", "put", ["old"]),
        ("after link", "put", ["new", "old"]),
        ("before rename", "download", ["old"]),
    ],
)
def test_a_killed_process_leaves_nothing_that_looks_complete_and_is_not(store, when, action, listed):
    store.put_if_absent("old", b"y" * 1000, {})
    command = [sys.executable, "-c", KILLED, store.url, "", when, action]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGKILL)
    assert len(temporaries(store.local_root)) == 1
    assert [info.path for info in store.list()] == listed
    assert all(info.n_bytes == 1000 for info in store.list())
    assert store.put_if_absent("new", b"x" * 1000, {}) is ("new" not in listed)
    assert store.read("new") == b"x" * 1000


def test_what_is_no_file_is_no_object(store):
    store.local_root.mkdir()
    os.mkfifo(store.local_root / "pipe")
    (store.local_root / "zero").symlink_to("/dev/zero")
    (store.local_root / "self").symlink_to("self")
    (store.local_root / "folder").mkdir()
    for name in ("pipe", "zero", "self", "folder", "none"):
        assert store.info(name) is None
    assert list(store.list()) == []


def test_folders_that_link_to_each_other_are_not_walked_in_every_order(store):
    for one in range(10):
        for other in range(10):
            (store.local_root / f"d{one}").mkdir(parents=True, exist_ok=True)
            (store.local_root / f"d{one}" / str(other)).symlink_to(f"../d{other}")
    with pytest.raises(StoreDenied, match="1000 folders behind links"):
        store.list()


def test_a_link_to_everything_is_not_followed_to_its_end(store):
    store.local_root.mkdir()
    (store.local_root / "all").symlink_to("/")
    with pytest.raises(StoreDenied, match=r"listing .* was refused"):
        store.list()


def test_folders_within_folders_are_listed_to_any_depth(store):
    folder = store.local_root
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(1200):  # more than Python's stack has room for
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)
    try:
        assert [info.path for info in store.list()] == ["d/" * 1200 + "x"]
    finally:
        subprocess.run(
            ["rm", "-r", str(folder / "d")], check=True
        )  # shutil.rmtree calls itself for each level


def test_a_disk_that_fails_is_no_missing_file(store, monkeypatch):
    store.put_if_absent("folder/a", b"x", {})

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    class Broken:
        name = "a"
        stat = broken

    monkeypatch.setattr(os, "scandir", lambda path: [Broken()])
    with pytest.raises(StoreError, match=r"listing .* failed after 1 try: Input/output error"):
        store.list()
    monkeypatch.setattr(os, "stat", broken)
    with pytest.raises(StoreError, match=r"looking up .* failed after 1 try: Input/output error"):
        store.info("folder/a")


def test_a_report_is_not_written_through_a_link_that_leads_out(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    store.local_root.mkdir()
    (store.local_root / "ray_merge").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreDenied, match="leads out of"):
        store.replace("ray_merge/evaluation.json", b"{}")
    assert [*(tmp_path / "elsewhere").iterdir()] == []


def test_a_write_of_nothing_is_not_repeated_for_ever(monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="nothing was written at byte 7"):
        write_at(0, b"bytes", 7)
