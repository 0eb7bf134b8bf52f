"""az:// through adlfs on Azurite, Microsoft's emulator. Skips without them:

pip install adlfs; npm install azurite; export RAY_MERGE_AZURITE=.../node_modules/.bin/azurite-blob
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray_merge.errors import ShardConflict
from ray_merge.storage.commit import commit_bytes, probe
from ray_merge.storage.store import open_store
from s3_server import free_ports

# Azurite's own account and key: they stand in its documentation.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
LARGE = 65 << 20
"""Above 64 MiB the library sends blocks, and the list of blocks is what must be conditional."""


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    blobs = pytest.importorskip("azure.storage.blob", reason="no adlfs: pip install adlfs")
    pytest.importorskip("adlfs")
    program = os.environ.get("RAY_MERGE_AZURITE") or shutil.which("azurite-blob")
    if program is None:
        pytest.skip("no Azurite: npm install azurite, and name azurite-blob in RAY_MERGE_AZURITE")
    port = free_ports()
    options = [
        "--blobPort",
        str(port),
        "--inMemoryPersistence",
        "--skipApiVersionCheck",
        "--disableTelemetry",
    ]
    folder = tmp_path_factory.mktemp("azurite")
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen([program, *options], cwd=folder, stdout=log, stderr=log) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            wait_for(port)
            where = f"http://127.0.0.1:{port}/{ACCOUNT}"
            settings = (
                f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={where};"
            )
            patch.setenv("AZURE_STORAGE_CONNECTION_STRING", settings)
            blobs.BlobServiceClient.from_connection_string(settings).create_container("tests")
            yield "az://tests"
        finally:
            server.kill()


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


@pytest.fixture
def url(container):
    return f"{container}/{uuid.uuid4().hex}"


@pytest.mark.parametrize(("n_bytes", "races"), [(10, 10), (LARGE, 1)])
@pytest.mark.parametrize("from_file", [True, False])
def test_of_eight_writers_at_once_exactly_one_wins_and_its_bytes_stay(
    url, tmp_path, n_bytes, races, from_file
):
    writers = 8 if n_bytes < LARGE else 3
    sources = [bytes([number]) * n_bytes for number in range(writers)]
    if from_file:
        files = [tmp_path / str(number) for number in range(writers)]
        for file, data in zip(files, sources, strict=True):
            file.write_bytes(data)
    stores = [open_store(url) for _ in range(writers)]
    for race in range(races):

        def put(number, name=f"shard-{race}"):
            source = files[number] if from_file else sources[number]
            return stores[number].put_if_absent(name, source, {"sha256": "1" * 64})

        with ThreadPoolExecutor(writers) as pool:
            won = [*pool.map(put, range(writers))]
        assert sum(won) == 1
        assert stores[0].read(f"shard-{race}") == sources[won.index(True)]


def test_a_store_on_azure_keeps_what_every_store_promises(url, tmp_path):
    store = open_store(url)
    assert list(store.list()) == []
    assert store.info("a") is None
    assert store.put_if_absent("a/lambda=0.2", bytes(range(100)), {"sha256": "x"}) is True
    assert store.put_if_absent("a/lambda=0.2", b"other", {}) is False
    (info,) = store.list()
    assert info == store.info("a/lambda=0.2")
    assert (info.path, info.n_bytes) == ("a/lambda=0.2", 100)
    assert info.version
    assert store.info("a") is None
    assert list(store.read_ranges("a/lambda=0.2", [(90, 95), (0, 3)])) == [
        bytes(range(90, 95)),
        bytes(range(3)),
    ]
    assert store.sub("a").read("lambda=0.2", 5) == bytes(range(5, 100))
    store.download("a/lambda=0.2", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bytes(range(100))


def test_without_metadata_a_commit_hashes_what_is_there(url):
    store = open_store(url)
    assert probe(store, b"# merge id: ab\n", "ab") is True
    assert probe(store, b"# merge id: ab\n", "ab") is False
    assert commit_bytes(store, "shard", b"bytes", "ab") is False
    assert commit_bytes(store, "shard", b"bytes", "ab") is True
    with pytest.raises(ShardConflict):
        commit_bytes(store, "shard", b"other", "ab")
