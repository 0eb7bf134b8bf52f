"""The same runs with base, adapters and output on a real S3 server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import ray_merge
from fault_proxy import fault_proxy
from ray_merge.errors import RunFailed
from ray_merge.storage.commit import MANIFEST
from ray_merge.storage.store import open_store
from zoo import llama_adapters, tiny_llama

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def inputs(s3, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base")
    llama_adapters(folder / "base", folder / "adapters", 2)
    return folder


@pytest.fixture(scope="module")
def remote(s3, inputs) -> str:
    """The inputs, copied to the bucket."""
    url = f"{s3.url}/inputs-{uuid.uuid4().hex[:8]}"
    store = open_store(url)
    for path in inputs.rglob("*"):
        if path.is_file():
            store.put_if_absent(str(path.relative_to(inputs)), path.read_bytes(), {})
    return url


def recipe(inputs: str | Path, output: str | Path):
    return {
        "base_model": f"{inputs}/base",
        "output": str(output),
        "adapters": {f"a{i}": f"{inputs}/adapters/a{i}" for i in range(2)},
        "merges": [
            {"name": "scale", "merge_method": "task_arithmetic", "sweep": {"lambda": [0.2, 0.4]}},
            {
                "name": "core",
                "merge_method": "ties",
                "parameters": {"scope": "tensor", "space": "core"},
                "export": "both",
            },
        ],
    }


def digests(url: str | Path) -> dict[str, str]:
    """sha256 of the weights, heads, configs and tables; ids differ, because an S3 object is known by its etag."""
    store = open_store(str(url))
    skipped = ("receipts/", "timeline.parquet", "recipe.yaml", "MANIFEST.json", "README.md")
    return {
        info.path: hashlib.sha256(store.read(info.path)).hexdigest()
        for info in store.list()
        if not any(word in info.path for word in skipped)
    }


@pytest.fixture(scope="module")
def local(inputs, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("local")
    ray_merge.run(recipe(inputs, folder / "out"), engine="local", cache_dir=folder / "cache")
    return digests(folder / "out")


def test_s3_to_s3_gives_the_bytes_of_local_to_local(s3, remote, local, tmp_path):
    output = f"{s3.url}/out-{uuid.uuid4().hex[:8]}"
    ray_merge.run(recipe(remote, output), engine="local", cache_dir=tmp_path / "cache")
    assert digests(output) == local
    again = ray_merge.run(recipe(remote, output), engine="local", cache_dir=tmp_path / "cache")
    assert again.units_run == 0
    assert len(ray_merge.verify(output, cache_dir=tmp_path / "cache")) == 3
    left = [path for path in (tmp_path / "cache" / "scratch").rglob("*") if path.is_file()]
    assert left == []


@pytest.mark.ray
def test_ray_workers_publish_to_s3(s3, ray_session, remote, local, tmp_path):
    output = f"{s3.url}/out-{uuid.uuid4().hex[:8]}"
    ray_merge.run(recipe(remote, output), workers=2, cache_dir=tmp_path / "cache")
    assert digests(output) == local


def test_kill_9_of_the_driver_on_s3_then_run_again_gives_one_result(s3, remote, local, tmp_path):
    output = f"{s3.url}/out-{uuid.uuid4().hex[:8]}"
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(remote, output)))
    command = [sys.executable, "-m", "ray_merge", "run", str(path), "--engine", "local"]
    process = subprocess.Popen([*command, "--cache-dir", str(tmp_path / "cache")], stderr=subprocess.DEVNULL)
    store = open_store(output)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and sum("receipts/" in i.path for i in store.list()) < 4:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not all(
        store.info(f"{name}/{MANIFEST}") for name in ("core", "scale/lambda=0.2", "scale/lambda=0.4")
    )
    result = ray_merge.run(recipe(remote, output), engine="local", cache_dir=tmp_path / "cache")
    assert result.units_adopted >= 4
    assert digests(output) == local


def test_shards_on_s3_carry_their_sha256_and_merge_id(s3, remote, tmp_path):
    output = f"{s3.url}/out-{uuid.uuid4().hex[:8]}"
    result = ray_merge.run(
        recipe(remote, output), engine="local", cache_dir=tmp_path / "cache", only=["core"]
    )
    store = open_store(f"{output}/core")
    for name in ("model-00001-of-00004.safetensors", "adapter/adapter_model.safetensors", "config.json"):
        stored = store.metadata(name)
        assert stored["sha256"] == hashlib.sha256(store.read(name)).hexdigest()
        assert stored["merge-id"] == result.merges[0].id


def test_a_driver_that_begins_while_another_looks_is_not_taken_for_a_stranger(s3, remote, local, tmp_path):
    output = f"{s3.url}/out-{uuid.uuid4().hex[:8]}"
    begun = []

    def other_driver_begins(call):
        # The listing of the folder comes after the look at recipe.yaml, which was not there.
        looks = any(name in call.target for name in ("recipe.yaml", "MANIFEST"))
        lists = "list-type=2" in call.target and f"{output.rpartition('/')[2]}%2Fcore" in call.target
        if lists and not looks and not begun:
            begun.append(call)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
                ray_merge.run(
                    recipe(remote, output), engine="local", cache_dir=tmp_path / "other", only=["core"]
                )

    with fault_proxy(s3.endpoint, other_driver_begins) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        ray_merge.run(recipe(remote, output), engine="local", cache_dir=tmp_path / "cache")
    assert len(begun) == 1
    assert digests(output) == local


@pytest.mark.parametrize("back", [False, True], ids=["replaced", "replaced and put back"])
def test_no_shard_is_made_of_a_base_that_is_another_one_for_a_moment(
    s3, inputs, local, tmp_path, monkeypatch, back
):
    url = f"{s3.url}/{uuid.uuid4().hex[:8]}"
    store = open_store(url)
    for path in inputs.rglob("*"):
        if path.is_file():
            store.put_if_absent(str(path.relative_to(inputs)), path.read_bytes(), {})
    tiny_llama(tmp_path / "other", seed=7)
    old, new = ((f / "model.safetensors").read_bytes() for f in (inputs / "base", tmp_path / "other"))
    turn = 0

    def replace_it(call):
        nonlocal turn
        if call.method == "GET" and call.target.partition("?")[0].endswith("base/model.safetensors"):
            turn += 1
            if turn == 12:
                store.replace("base/model.safetensors", new)
            if turn == 14 and back:
                store.replace("base/model.safetensors", old)

    expected = pytest.raises(RunFailed, match=r"base/model\.safetensors changed in mid-run: version ")
    with fault_proxy(s3.endpoint, replace_it) as proxy, contextlib.suppress(RunFailed) if back else expected:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        ray_merge.run(recipe(url, f"{url}/out"), engine="local", workers=1, cache_dir=tmp_path / "cache")
    assert turn >= 12
    monkeypatch.undo()
    made = {path: digest for path, digest in digests(f"{url}/out").items() if "/model-" in path}
    assert made.items() <= local.items()
    assert back or made.keys() < {path for path in local if "/model-" in path}
