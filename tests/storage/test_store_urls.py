from __future__ import annotations

import os
import pickle

import pytest

from ray_merge.errors import Refusal, StoreError, StoreUnfit
from ray_merge.storage.remote import RemoteStore
from ray_merge.storage.retry import Backoff
from ray_merge.storage.store import ObjectInfo, Store, Stores, join, open_store, redact


@pytest.fixture
def memory():
    """A folder of fsspec's memory file system: the code of gs:// and hf:// without their servers."""
    import fsspec

    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_a_plain_path_and_its_file_url_are_the_same_store(tmp_path, monkeypatch):
    folder = tmp_path / "scale" / "lambda=0.2,density=0.5 %41"
    assert open_store(str(folder)).url == str(folder)
    assert open_store(folder.as_uri()).url == str(folder)
    assert open_store(f"{folder}/./x/..//").url == str(folder)
    monkeypatch.chdir(tmp_path)
    assert open_store("scale").local_root == tmp_path / "scale"


def test_a_home_folder_is_expanded():
    assert open_store("~/models").url == os.path.join(os.path.expanduser("~"), "models")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ray://head:10001", "address of a Ray cluster"),
        ("https://host/model", "web page"),
        ("nosuch://bucket/x", "unknown protocol nosuch://; known: a plain path"),
        ("s3://", "names no bucket"),
        ("", "no URL and no path"),
        ("simplecache::s3://b/x", "chained"),
        ("file://host/path", "three slashes"),
        ("file://", "names no folder"),
        ("file:///", "names no folder"),
        ("s3://key:geheim@bucket/x", "s3://bucket/x: credentials do not belong into a URL"),
        ("s3://bucket/x?versionId=geheim", "s3://bucket/x: a folder's URL takes no query"),
        ("gs://key:geheim@bucket/x", "credentials do not belong"),
    ],
)
def test_a_url_that_cannot_be_a_store_is_refused_with_the_reason(url, says):
    with pytest.raises(Refusal) as caught:
        open_store(url)
    assert says in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_a_missing_library_is_named():
    with pytest.raises(Refusal, match="sftp:// needs a library that is not installed"):
        open_store("sftp://bucket/x")


def test_urls_are_normalised_and_joined_with_single_slashes():
    assert open_store("s3://bucket//a/b/").url == "s3://bucket/a/b"
    assert join("s3://bucket/", "a", "b/c") == "s3://bucket/a/b/c"
    assert join("/", "a") == "/a"
    assert join("hf://org/name@rev", "config.json") == "hf://org/name@rev/config.json"


def test_redaction_leaves_the_revision_of_a_hub_url():
    assert redact("hf://org/name@v1") == "hf://org/name@v1"
    assert redact("sftp://me:geheim@host/x") == "sftp://host/x"


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "a\0", "a\n"]
)
def test_a_path_that_leaves_the_folder_is_refused_everywhere(path, tmp_path):
    store = open_store(str(tmp_path / "root"))
    calls = [
        lambda: store.info(path),
        lambda: store.read(path),
        lambda: store.read_ranges(path, [(0, 1)]),
        lambda: store.put_if_absent(path, b"", {}),
        lambda: store.metadata(path),
        lambda: store.download(path, tmp_path / "copy"),
        lambda: store.sub(path),
        lambda: join(store.url, path),
        *([lambda: store.list(path)] if path else []),
    ]
    for call in calls:
        with pytest.raises(Refusal, match="not a relative path inside"):
            call()
    assert not (tmp_path / "copy").exists()


def test_names_of_unfinished_files_and_odd_metadata_cannot_be_published(tmp_path):
    store = open_store(str(tmp_path))
    with pytest.raises(Refusal, match="kept for unfinished files"):
        store.put_if_absent("a/.tmp-1", b"", {})
    for metadata in (
        {"merge_id": "x"},
        {"Sha256": "x"},
        {"sha256": "\xe4"},
        {"sha256": "a\nb"},
        {"sha256": " a"},
    ):
        with pytest.raises(ValueError, match="printable ASCII"):
            store.put_if_absent("a", b"", metadata)
    assert store.list() == []


def test_a_store_is_not_pickled_but_its_url_and_infos_are(tmp_path):
    for url in (str(tmp_path), "s3://bucket/x", "memory://x"):
        store = open_store(url)
        assert isinstance(store, Store)
        with pytest.raises(TypeError, match="send its url and call open_store"):
            pickle.dumps(store)
    info = ObjectInfo("a", 1, "v")
    assert pickle.loads(pickle.dumps(info)) == info


def test_any_fsspec_store_can_be_read(memory, tmp_path):
    memory.pipe(
        {"/models/base/config.json": b"{}", "/models/base/sub/w": bytes(range(100)), "/models/other": b""}
    )
    store = open_store("memory://models/base")
    assert [info.path for info in store.list()] == ["config.json", "sub/w"]
    assert [info.path for info in store.list("sub")] == ["sub/w"]
    assert store.list("nothing") == []
    assert store.info("sub") is None
    assert store.info("nothing") is None
    assert store.info("sub/w").n_bytes == 100
    assert store.sub("sub").read("w", 10, 20) == bytes(range(10, 20))
    assert store.read_ranges("sub/w", [(90, 100), (0, 3)]) == [bytes(range(90, 100)), b"\0\1\2"]
    store.download("sub/w", tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == bytes(range(100))
    with pytest.raises(StoreError, match=r"it is 100 bytes long, wanted 90\.\.101"):
        store.read("sub/w", 90, 101)


def test_a_store_without_atomic_create_is_unfit_for_writing(memory):
    with pytest.raises(StoreUnfit, match="memory://out cannot publish exactly once"):
        open_store("memory://out").put_if_absent("a", b"", {})
    assert memory.find("/out") == []


def test_exclusive_create_of_the_library_decides_where_it_is_atomic(memory):
    # Stands for gs://: the same calls with gcsfs' arguments, on a file system that raises FileExistsError.
    store = RemoteStore(memory, "/bucket", "gs://bucket", Backoff(attempts=1))
    assert store.put_if_absent("a", b"one", {"sha256": "1"})
    assert not store.put_if_absent("a", b"two", {"sha256": "2"})
    assert store.read("a") == b"one"
    assert store.metadata("a") == {}
    memory.pipe_file = None  # any other failure of the library is told, not taken for "exists"
    try:
        with pytest.raises(StoreError, match="writing gs://bucket/b failed after 1 try: 'NoneType'"):
            store.put_if_absent("b", b"x", {})
    finally:
        del memory.pipe_file


@pytest.mark.parametrize("url", ["s3://bucket/a/b c/", "s3://bucket", "gs:x", "plain/path", "/tmp/x"])
def test_stores_open_what_open_store_opens(url):
    assert Stores().open(url).url == open_store(url).url


def test_stores_refuse_credentials_like_open_store():
    with pytest.raises(Refusal, match="credentials"):
        Stores().open("s3://key:secret@bucket/path")
